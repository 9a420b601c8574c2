"""A job on this machine, from its input to its output."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_server.batch.engines import Engine
from steer_server.batch.identifiers import RowSet
from steer_server.batch.job import Job, JobError, differences, job_path, load_job, new_job, save_job
from steer_server.batch.read_rows import read_rows
from steer_server.batch.reports import Report
from steer_server.batch.row_file import LineStream, RowFile, RowFileError
from steer_server.batch.rows import Result, decode_finished, row_number
from steer_server.batch.runner import Output, run_rows
from steer_server.batch.sources import FileSource, StandardInput, format_of
from steer_server.batch.summary import Summary
from steer_server.batch.sweep import Sweep


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line.

    source, output: None for standard input and output. options: JSON-able, what else decides the answers.
    in_flight: None for what suits the engine. result_stream: descriptor for results where `output` is None.
    """

    source: Path | None
    output: Path | None
    sweep: Sweep
    resume: bool
    retry_errors: bool
    in_flight: int | None
    options: dict[str, Any]
    result_stream: int = 1


class OutputFiles:
    """Where a job's rows are kept: its output, or beside a Parquet output, which is only written whole, its rows."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.job = job_path(output)
        self.format = format_of(output)
        self.rows = output.with_name(f"{output.name}.rows.jsonl") if self.format == "parquet" else output

    def check_new(self) -> None:
        """Raises JobError where something would be overwritten."""
        for path in {self.output, self.rows}:
            if path.exists():
                raise JobError(f"{path} exists; give --resume to go on with it, or another output")


async def run_job(settings: Settings, engine: AbstractAsyncContextManager[Engine], report: Report) -> Summary:
    """Run it to its end. Raises JobError, SourceError, RowFileError, InputChangedError, EngineStoppedError.

    engine: entered when everything that needs no engine has been checked.
    """
    if settings.output is None or settings.source is None:
        return await _run_stream(settings, engine, report)
    files = OutputFiles(settings.output)
    if not settings.resume:
        files.check_new()
    source = FileSource(settings.source)
    facts = job_facts(settings, source)
    created = not files.rows.exists()
    rows_file = RowFile(files.rows, files.format == "gzip")
    with rows_file:
        try:
            resumed = resumed_job(files, facts, begun=not rows_file.empty)
            report.stage("starting the engine")
            async with engine as started:
                facts |= {"engine": await started.facts()}
                if resumed is not None:
                    _refuse_another(resumed.facts, facts, files)
                job = resumed or new_job(facts)
                if resumed is None:
                    save_job(files.job, job)
                finished, summary = finished_rows(rows_file, job, settings.retry_errors)
                total = source.total * settings.sweep.count
                rows = read_rows(source.lines(), finished, settings.sweep)
                await _run(job, rows, started, rows_file, settings, total, summary, report)
        except BaseException:
            if created and rows_file.empty:
                files.rows.unlink()
            raise
        if files.format == "parquet":
            report.stage("writing Parquet")
            await asyncio.to_thread(write_parquet, files, rows_file, job, settings.sweep)
    return summary


async def _run_stream(settings: Settings, engine: AbstractAsyncContextManager[Engine], report: Report) -> Summary:
    """A job whose input cannot be read again or whose output is not kept: nothing to resume."""
    if settings.resume:
        raise JobError("only a job from a file into a file can be resumed: a pipe cannot be read or written again")
    source = StandardInput() if settings.source is None else FileSource(settings.source)
    output: LineStream | RowFile
    files = None
    if settings.output is None:
        output = LineStream(settings.result_stream)
    else:
        files = OutputFiles(settings.output)
        files.check_new()
        output = RowFile(files.rows, files.format == "gzip")
    with contextlib.closing(output):
        report.stage("starting the engine")
        job, summary = new_job({}), Summary()
        async with engine as started:
            rows = read_rows(source.lines(), RowSet(), settings.sweep)
            total = None if source.total is None else source.total * settings.sweep.count
            await _run(job, rows, started, output, settings, total, summary, report)
        if files is not None and files.format == "parquet" and isinstance(output, RowFile):
            await asyncio.to_thread(write_parquet, files, output, job, settings.sweep)
    return summary


async def _run(
    job: Job,
    rows: Iterator[list[Any]],
    engine: Engine,
    output: Output,
    settings: Settings,
    total: int | None,
    summary: Summary,
    report: Report,
) -> None:
    def count(result: Result) -> None:
        summary.add(result)
        report.advanced()

    summary.start()
    report.started(total, summary)
    try:
        await run_rows(job.identifier, rows, engine.answer, output, settings.in_flight or engine.in_flight, count)
    finally:
        summary.stop()


def job_facts(settings: Settings, source: FileSource) -> dict[str, Any]:
    return {
        "input": {"sha256": source.fingerprint.sha256, "bytes": source.fingerprint.size, "format": source.format},
        "sweep": settings.sweep.as_json(),
        "options": settings.options,
    }


def resumed_job(files: OutputFiles, facts: dict[str, Any], begun: bool) -> Job | None:
    """The job that the output was begun by, None where nothing was begun. Raises JobError where that was another.

    facts: what is known of this one before an engine has started.
    """
    if not begun:
        if files.output.exists() and files.output != files.rows:
            raise JobError(f"{files.output} is complete, and {files.rows}, which it was made from, is gone")
        return None
    job = load_job(files.job)
    _refuse_another({name: job.facts.get(name) for name in facts}, facts, files)
    return job


def _refuse_another(before: dict[str, Any], now: dict[str, Any], files: OutputFiles) -> None:
    changed = differences(before, now)
    if changed:
        raise JobError(f"{files.output} holds the rows of another job and cannot be resumed: {'; '.join(changed)}")


def finished_rows(rows_file: RowFile, job: Job, retry_errors: bool) -> tuple[RowSet, Summary]:
    """Which rows stand in the file already. retry_errors: take those out that failed. Raises RowFileError."""
    finished, failed = RowSet(), 0

    def kept(line: bytes) -> bool:
        nonlocal failed
        decoded = decode_finished(line)
        number = row_number(job.identifier, decoded.id)
        if number is None:
            raise RowFileError(f"{rows_file.path} holds a row that this job did not write: {decoded.id!r}")
        if decoded.failed:
            if retry_errors:
                return False
            failed += 1
        finished.add(number)
        return True

    try:
        if retry_errors:
            rows_file.rewrite(kept)
        else:
            for line in rows_file.lines():
                kept(line)
    except ValueError as invalid:
        raise RowFileError(f"{rows_file.path} holds a line that is no result: {invalid}") from None
    return finished, Summary(finished_earlier=len(finished), failed_earlier=failed)


def write_parquet(files: OutputFiles, rows_file: RowFile, job: Job, sweep: Sweep) -> None:
    from steer_server.batch.parquet import write_results, write_tidy

    if sweep.names:
        write_tidy(files.output, rows_file.lines(), job.identifier, sweep)
    else:
        write_results(files.output, rows_file.lines())
