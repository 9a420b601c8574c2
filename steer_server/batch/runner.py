"""The loop of every batch: bounded in flight, written as completed, in groups that are on the disk before they count.

It knows no engine, no file and no HTTP; the command line, the server's `/v1/batches` and the tests bring theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

from steer_server.batch.rows import Answer, Refused, Request, Result, answered_result, refused_result

Rows = Iterator[list[Request | Refused]]
AnswerRow = Callable[[Request], Awaitable[Answer]]

MAX_GROUP = 1024
"""Result lines that may wait for the disk."""

BUSY = (429, 503)
ABORTED = (b'"finish_reason":"abort"', b'"status":"cancelled"')
"""In an answer that a server gave up, as one that shuts down does. In JSON strings these quotes would be escaped."""

PATIENCE = 600.0
"""Seconds for which a row is asked again where the server has no room for it."""


class EngineStoppedError(RuntimeError):
    """Nothing answers any more. The job stops; rows that it had not answered are not failed rows."""


class Output(Protocol):
    """Where result lines go. Blocking; called from a thread, never twice at a time."""

    def append(self, lines: bytes) -> None: ...


async def run_rows(
    job: str,
    rows: Rows,
    answer: AnswerRow,
    output: Output,
    in_flight: int,
    finished: Callable[[Result], None],
) -> None:
    """Answer every row and write its result.

    rows: read from a thread, in groups, only as fast as they are answered. in_flight: rows being answered at a time.
    finished: called for each result once it is on the disk. Raises whatever reading, answering or writing raised; what
    was answered before that is written first. The same when it is cancelled.
    """
    results: asyncio.Queue[Result] = asyncio.Queue(MAX_GROUP)
    places = asyncio.Semaphore(in_flight)
    running: set[asyncio.Task[None]] = set()
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def answer_one(row: Request) -> None:
        try:
            result = answered_result(job, row, await answer_patiently(answer, row))
            await results.put(result)
        finally:
            places.release()

    def ended(task: asyncio.Task[None]) -> None:
        running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not failed.done():
            failed.set_exception(error)

    async def start_all() -> None:
        while (group := await _next_group(rows)) is not None:
            for row in group:
                if isinstance(row, Refused):
                    await results.put(refused_result(job, row))
                    continue
                await places.acquire()
                task = asyncio.create_task(answer_one(row))
                running.add(task)
                task.add_done_callback(ended)
        while running:
            await asyncio.wait(set(running))

    writer = asyncio.create_task(_write(results, output, finished))
    starter = asyncio.create_task(start_all())
    try:
        await asyncio.wait({starter, writer, failed}, return_when=asyncio.FIRST_COMPLETED)
        for first in (writer, failed, starter):
            if first.done():
                first.result()
    finally:
        for task in (starter, *running):
            task.cancel()
        await asyncio.gather(starter, *running, return_exceptions=True)
        # Results that were ready are kept, whatever ended the job; unless it was the writing itself.
        written = asyncio.create_task(results.join())
        await asyncio.wait({written, writer}, return_when=asyncio.FIRST_COMPLETED)
        for task in (written, writer):
            task.cancel()
        if failed.done():
            failed.exception()
        with contextlib.suppress(asyncio.CancelledError):
            await writer


async def _next_group(rows: Rows) -> list[Request | Refused] | None:
    """Read from a thread that may be left behind: a silent pipe must not keep a job from stopping."""
    loop = asyncio.get_running_loop()
    read: asyncio.Future[list[Request | Refused] | None] = loop.create_future()

    def settle(group: list[Request | Refused] | None, error: BaseException | None) -> None:
        if read.cancelled():
            return
        if error is None:
            read.set_result(group)
        else:
            read.set_exception(error)

    def work() -> None:
        group, error = None, None
        try:
            group = next(rows, None)
        except Exception as failed:
            error = failed
        with contextlib.suppress(RuntimeError):
            # The loop may be closed by now.
            loop.call_soon_threadsafe(settle, group, error)

    threading.Thread(target=work, name="batch-read", daemon=True).start()
    return await read


async def _write(results: asyncio.Queue[Result], output: Output, finished: Callable[[Result], None]) -> None:
    while True:
        group = [await results.get()]
        # While one group goes to the disk the next one gathers: groups grow only where the disk is the slower part.
        while len(group) < MAX_GROUP and not results.empty():
            group.append(results.get_nowait())
        await asyncio.to_thread(output.append, b"".join(result.line for result in group))
        for result in group:
            finished(result)
            results.task_done()


async def answer_patiently(answer: AnswerRow, row: Request) -> Answer:
    """Ask again where there was no room or the answer was given up: a batch has time to wait."""
    waited, pause = 0.0, 0.25
    while True:
        answered = await answer(row)
        again = answered.status in BUSY or any(mark in answered.body for mark in ABORTED)
        if not again or waited >= PATIENCE:
            return answered
        pause = min(answered.retry_after or 2 * pause, 30.0)
        await asyncio.sleep(pause)
        waited += pause
