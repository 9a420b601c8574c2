"""What a job says while it runs and when it ends: to people, to machines, or nothing."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from steer_server.batch.summary import Summary

PROGRESS_SECONDS = 10.0


class Report(Protocol):
    def stage(self, name: str) -> None:
        """What the job is at, before rows are answered."""

    def started(self, total: int | None, summary: Summary) -> None:
        """total: rows of the whole job, where known. summary: kept up to date by the job."""

    def advanced(self) -> None:
        """More rows are finished."""

    def ended(self, summary: Summary) -> None: ...

    def stopped(self, message: str) -> None:
        """The job could not run, or not to its end."""


class BarReport:
    """A progress bar and a table on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=None, rate="")
        self._summary = Summary()

    def stage(self, name: str) -> None:
        self._progress.start()
        self._progress.update(self._task, description=name)

    def started(self, total: int | None, summary: Summary) -> None:
        self._summary = summary
        self._progress.reset(self._task, total=total, completed=summary.finished_earlier, description="rows", rate="")

    def advanced(self) -> None:
        summary = self._summary
        rate = f"{summary.finished / max(summary.seconds, 1e-9):.1f} rows/s"
        failed = f", {summary.failed} failed" if summary.failed else ""
        self._progress.update(self._task, completed=summary.finished_earlier + summary.finished, rate=rate + failed)

    def ended(self, summary: Summary) -> None:
        self._progress.stop()
        numbers = summary.as_json()
        table = Table(show_header=False, title="batch")
        table.add_row("rows", f"{numbers['rows']:,}")
        if summary.finished_earlier:
            table.add_row("of them finished earlier", f"{summary.finished_earlier:,}")
        table.add_row("failed rows", f"{numbers['failed']:,}")
        for kind, count in summary.failures.most_common():
            table.add_row(f"  {kind}", f"{count:,}")
        table.add_row("prompt tokens", f"{summary.prompt_tokens:,}")
        table.add_row("generated tokens", f"{summary.completion_tokens:,}")
        table.add_row("steered tokens", f"{summary.steered_tokens:,}")
        table.add_row("seconds", f"{summary.seconds:.1f}")
        table.add_row("rows per second", f"{numbers['rows_per_second']:,}")
        table.add_row("tokens per second", f"{numbers['tokens_per_second']:,}")
        self._console.print(table)

    def stopped(self, message: str) -> None:
        self._progress.stop()
        self._console.print(f"error: {message}", highlight=False, markup=False, soft_wrap=True)


class JsonReport:
    """One JSON object a line, each with its `event`."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._summary = Summary()
        self._total: int | None = None
        self._said = 0.0

    def say(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields})
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()

    def stage(self, name: str) -> None:
        self.say("stage", stage=name)

    def started(self, total: int | None, summary: Summary) -> None:
        self._summary, self._total = summary, total
        self._said = time.monotonic()
        self.say("started", total=total, finished_earlier=summary.finished_earlier)

    def advanced(self) -> None:
        if time.monotonic() - self._said >= PROGRESS_SECONDS:
            self._said = time.monotonic()
            self.say("progress", total=self._total, **self._summary.as_json())

    def ended(self, summary: Summary) -> None:
        self.say("summary", **summary.as_json())

    def stopped(self, message: str) -> None:
        self.say("error", message=message)


class QuietReport:
    """Nothing but why a job stopped."""

    def stage(self, name: str) -> None: ...

    def started(self, total: int | None, summary: Summary) -> None: ...

    def advanced(self) -> None: ...

    def ended(self, summary: Summary) -> None: ...

    def stopped(self, message: str) -> None:
        Console(stderr=True).print(f"error: {message}", highlight=False, markup=False, soft_wrap=True)


def engine_lines_as_json(report: JsonReport) -> None:
    """From now on, what this process and its children print becomes events of the report.

    The report must have been given a stream of its own before.
    """
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)

    def forward() -> None:
        with os.fdopen(reading, errors="replace") as lines:
            for line in lines:
                if line.strip():
                    report.say("log", line=line.rstrip("\n"))

    threading.Thread(target=forward, daemon=True, name="batch-log").start()
