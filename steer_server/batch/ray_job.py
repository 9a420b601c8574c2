"""A job on a Ray cluster: Ray Data spreads the rows over engines, and keeps their results and what is finished."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from steer_server.batch.cluster import Cluster
from steer_server.batch.identifiers import RowSet
from steer_server.batch.job import Job, JobError, new_job, save_job
from steer_server.batch.local_job import OutputFiles, Settings, finished_rows, job_facts, resumed_job, write_parquet
from steer_server.batch.ray_replica import Replica, agree_on
from steer_server.batch.read_rows import read_rows
from steer_server.batch.reports import Report
from steer_server.batch.row_file import RowFile, sync_folder
from steer_server.batch.rows import Refused, Result, refused_result
from steer_server.batch.sources import FileSource
from steer_server.batch.summary import Summary

ROWS_PER_FILE = 1024
ROWS_PER_BLOCK = 64
BLOCKS_PER_REPLICA = 8
"""At most so many rows a block, and in small jobs at least so many blocks for a replica. A worker that dies repeats the
blocks that it was at."""

CALLS = 8
"""Blocks that a replica is at, at a time."""

CPUS_PER_REPLICA = 0.5
"""As Ray counts them. Tasks that read and write need some too, or nothing begins on a machine of few processors."""

INPUT_SCHEMA = pa.schema(
    [("number", pa.int64()), ("custom_id", pa.string()), ("url", pa.string()), ("body", pa.binary())]
)
INHERITED = ("VLLM_", "STEER_SERVER_", "HF_", "OMP_")
"""Environment that workers take over from the command, by prefix."""


class WorkFolder:
    """Beside the output, on a file system that every worker sees: Ray's input, its results, its checkpoint."""

    def __init__(self, output: Path, job: Job) -> None:
        self._all = output.with_name(f"{output.name}.ray").absolute()
        self.path = self._all / job.identifier
        self.input = self.path / "input"
        self.parts = self.path / "parts"
        self.checkpoint = self.path / "checkpoint"
        self.facts = self.path / "engine.json"

    @property
    def begun(self) -> bool:
        """Whether the input was written to its end."""
        return self.input.is_dir()

    def remove(self) -> None:
        shutil.rmtree(self._all, ignore_errors=True)

    def write_input(self, groups: Iterator[list[Any]]) -> Iterator[Refused]:
        """Write rows for Ray to read, at once or not at all; yields those that no engine needs to see."""
        self.remove()
        aside = self.path / "input.new"
        aside.mkdir(parents=True)
        rows = itertools.chain.from_iterable(groups)
        for index in itertools.count():
            taken = list(itertools.islice(rows, ROWS_PER_FILE))
            if not taken:
                break
            yield from (row for row in taken if isinstance(row, Refused))
            asked = [
                {"number": row.number, "custom_id": row.custom_id, "url": row.url, "body": row.body}
                for row in taken
                if not isinstance(row, Refused)
            ]
            if asked:
                table = pa.Table.from_pylist(asked, INPUT_SCHEMA)
                pyarrow.parquet.write_table(table, aside / f"{index:08d}.parquet")
        aside.rename(self.input)
        sync_folder(self.path)

    def results(self) -> Iterator[Result]:
        """Of every part that is whole. A row may come twice, where a worker died between a part and its checkpoint."""
        for path in sorted(self.parts.rglob("*.parquet")) if self.parts.is_dir() else ():
            try:
                file = pyarrow.parquet.ParquetFile(path)
            except pa.ArrowInvalid:
                # Torn: its rows are in no checkpoint and were answered again.
                continue
            for batch in file.iter_batches(ROWS_PER_FILE):
                for row in batch.to_pylist():
                    yield Result(**{name: row[name] for name in Result.__dataclass_fields__})


async def run_ray_job(settings: Settings, arguments: list[str], cluster: Cluster, report: Report) -> Summary:
    """Run it to its end. Raises as `run_job` does, and what Ray raises."""
    if settings.source is None or settings.output is None:
        raise JobError("a job on Ray goes from a file into a file")
    files = OutputFiles(settings.output)
    if not settings.resume:
        files.check_new()
    source = await asyncio.to_thread(FileSource, settings.source)
    facts = job_facts(settings, source)
    created = not files.rows.exists()
    with RowFile(files.rows, files.format == "gzip") as rows_file:
        try:
            # Ray's results are not in the output before the end, so the job may have begun while that is empty.
            begun = not rows_file.empty or (settings.resume and files.job.exists())
            job = resumed_job(files, facts, begun)
            if job is None:
                job = new_job(facts)
                save_job(files.job, job)
            work = WorkFolder(settings.output, job)
            if settings.retry_errors and work.begun:
                finished, _ = finished_rows(rows_file, job, retry_errors=False)
                await asyncio.to_thread(_merge, work, rows_file, finished, Summary())
                work.remove()
            finished, summary = finished_rows(rows_file, job, settings.retry_errors)
            report.started(source.total * settings.sweep.count, summary)
            summary.start()
            share = source.total * settings.sweep.count // (cluster.replicas * BLOCKS_PER_REPLICA)
            rows_per_block = max(1, min(share, ROWS_PER_BLOCK))
            while True:
                known = len(finished)
                if not work.begun:
                    rows = read_rows(source.lines(), finished, settings.sweep)
                    await asyncio.to_thread(_keep_refused, job, work.write_input(rows), rows_file, finished, summary)
                if "engine" in job.facts:
                    agree_on(work.facts, job.facts["engine"])
                report.stage("answering on Ray")
                await asyncio.to_thread(_answer_on_ray, work, job, arguments, cluster, rows_per_block)
                await asyncio.to_thread(_merge, work, rows_file, finished, summary)
                if "engine" not in job.facts and work.facts.exists():
                    job = Job(job.identifier, job.facts | {"engine": json.loads(work.facts.read_text())})
                    save_job(files.job, job)
                work.remove()
                # A checkpoint may know of rows whose part a kill tore; they are asked for once more.
                if not await asyncio.to_thread(any, read_rows(source.lines(), finished, settings.sweep)):
                    break
                if len(finished) == known:
                    raise JobError("Ray ended without answering the rows that are left")
            report.advanced()
            summary.stop()
        except BaseException:
            if created and rows_file.empty:
                files.rows.unlink()
            raise
        if files.format == "parquet":
            await asyncio.to_thread(write_parquet, files, rows_file, job, settings.sweep)
    return summary


def _keep_refused(job: Job, rows: Iterator[Refused], rows_file: RowFile, finished: RowSet, summary: Summary) -> None:
    for row in rows:
        result = refused_result(job.identifier, row)
        rows_file.append(result.line)
        finished.add(result.number)
        summary.add(result)


def _answer_on_ray(work: WorkFolder, job: Job, arguments: list[str], cluster: Cluster, rows_per_block: int) -> None:
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig

    if not any(work.input.iterdir()):
        return
    environment = {name: value for name, value in os.environ.items() if name.startswith(INHERITED)}
    ray.init(address=cluster.address, ignore_reinit_error=True, log_to_driver=False)
    try:
        context = DataContext.get_current()
        context.checkpoint_config = CheckpointConfig(
            id_column="number", checkpoint_path=str(work.checkpoint), delete_checkpoint_on_success=False
        )
        # Small files are read as one block, which would be one worker's; blocks are also what a checkpoint counts.
        rows = ray.data.read_parquet(str(work.input)).repartition(target_num_rows_per_block=rows_per_block)
        answered = rows.map_batches(
            Replica,
            fn_constructor_kwargs={
                "arguments": arguments,
                "environment": environment,
                "job": job.identifier,
                "facts": str(work.facts),
            },
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=cluster.replicas, max_tasks_in_flight_per_actor=2 * CALLS, max_concurrent_calls_per_actor=CALLS
            ),
            num_cpus=CPUS_PER_REPLICA,
            num_gpus=cluster.gpus,
            runtime_env={"env_vars": environment},
        )
        answered.write_parquet(str(work.parts))
    finally:
        ray.shutdown()


def _merge(work: WorkFolder, rows_file: RowFile, finished: RowSet, summary: Summary) -> None:
    """Append what Ray has answered and the output does not hold yet."""
    group: list[bytes] = []
    for result in work.results():
        if result.number in finished:
            continue
        finished.add(result.number)
        summary.add(result)
        group.append(result.line)
        if len(group) == ROWS_PER_FILE:
            rows_file.append(b"".join(group))
            group = []
    if group:
        rows_file.append(b"".join(group))
