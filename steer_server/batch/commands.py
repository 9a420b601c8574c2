"""`steer-server batch`: from its flags to a job and an exit status."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal

from steer_server.batch.cluster import Cluster
from steer_server.batch.engines import local_engine, server_engine
from steer_server.batch.job import JobError
from steer_server.batch.local_job import Settings, run_job
from steer_server.batch.reports import BarReport, JsonReport, QuietReport, Report, engine_lines_as_json
from steer_server.batch.row_file import RowFileError
from steer_server.batch.runner import EngineStoppedError
from steer_server.batch.sources import SourceError
from steer_server.batch.summary import Summary
from steer_server.batch.verified_file import InputChangedError

SOME_FAILED = 2

FREE_FLAGS = frozenset(
    {
        "--api-key",
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
        "--download-dir",
        "--gpu-memory-utilization",
        "--hf-token",
        "--host",
        "--kv-cache-memory-bytes",
        "--max-num-batched-tokens",
        "--max-num-seqs",
        "--port",
        "--uvicorn-log-level",
    }
)
"""Flags of vLLM that say how fast, where or with whose key, not what is answered: they may change on resuming."""


def deciding_flags(flags: list[str]) -> dict[str, list[str]]:
    """vLLM's flags that decide answers, by name, with their values."""
    named: dict[str, list[str]] = {}
    name = ""
    for flag in flags:
        if flag.startswith("-") and not _is_number(flag):
            name, separator, value = flag.partition("=")
            name = name.replace("_", "-")
            named[name] = [value] if separator else []
        else:
            named.setdefault(name, []).append(flag)
    return {name: named[name] for name in sorted(named) if name not in FREE_FLAGS}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def job_for(
    settings: Settings, arguments: list[str], server: str | None, cluster: Cluster | None, report: Report
) -> Coroutine[Any, Any, Summary]:
    """arguments: of `vllm serve`. server: the URL of a running one, which answers instead. cluster: where to run."""
    if cluster is not None:
        from steer_server.batch.ray_job import run_ray_job

        return run_ray_job(settings, arguments, cluster, report)
    if server is not None:
        return run_job(settings, server_engine(server, settings.in_flight), report)
    return run_job(settings, local_engine(arguments), report)


def run(job: Coroutine[Any, Any, Summary], report: Report) -> int:
    """The exit status: 0, 2 where rows failed, 1 where the job could not run to its end; the report then says why."""
    report.stage("reading the input")
    if isinstance(report, JsonReport):
        engine_lines_as_json(report)
    try:
        summary = asyncio.run(_interruptible(job))
    except (JobError, SourceError, RowFileError, InputChangedError, EngineStoppedError) as failure:
        report.stopped(str(failure))
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        report.stopped("interrupted; what is finished is kept, go on with --resume")
        return 1
    except Exception as failure:
        report.stopped(f"{type(failure).__name__}: {failure}")
        return 1
    report.ended(summary)
    return SOME_FAILED if summary.failed + summary.failed_earlier else 0


async def _interruptible(job: Coroutine[Any, Any, Summary]) -> Summary:
    task = asyncio.current_task()
    assert task is not None
    # SIGINT does the same by itself.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await job


def report_for(log_format: Literal["bar", "json"], quiet: bool) -> Report:
    if quiet:
        return QuietReport()
    if log_format == "json":
        return JsonReport(os.fdopen(os.dup(2), "w"))
    return BarReport()


def protected_stdout() -> int:
    """A descriptor of standard output for results alone; whatever else is printed goes to standard error."""
    descriptor = os.dup(1)
    os.dup2(2, 1)
    return descriptor


def as_path(text: str) -> Path | None:
    """A file; None for -, the standard stream."""
    return None if text == "-" else Path(text)
