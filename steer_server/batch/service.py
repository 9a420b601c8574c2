"""Batches that the server runs itself, on the engine that it serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from steer_server.batch.engines import Engine
from steer_server.batch.identifiers import RowSet
from steer_server.batch.read_rows import read_rows
from steer_server.batch.row_file import RowFile, RowFileError
from steer_server.batch.rows import Refused, Request, Result, decode_finished, refused_result, row_number
from steer_server.batch.runner import EngineStoppedError, run_rows
from steer_server.batch.sources import FileSource, SourceError
from steer_server.batch.store import OPEN, BatchStore, NotStoredError, now
from steer_server.batch.verified_file import InputChangedError

AT_ONCE = 4
"""Batches that run at a time. Together they take half of what the engine can run: the rest is for online requests."""

WATCH_SECONDS = 1.0
_log = logging.getLogger(__name__)


@dataclass
class Counts:
    """Rows of a batch that have ended."""

    completed: int = 0
    failed: int = 0


class BatchService:
    """Runs what stands open in the store, and goes on with it after a restart."""

    def __init__(self, store: BatchStore, engine: Engine) -> None:
        self.store = store
        self._engine = engine
        self._engine_facts: str | None = None
        self._places = asyncio.Semaphore(AT_ONCE)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Learn what the engine serves, and take up the batches that were begun with the same."""
        facts = json.dumps(await self._engine.facts(), sort_keys=True)
        self._engine_facts = sha256(facts.encode()).hexdigest()
        await asyncio.to_thread(self.store.delete_expired)
        for identifier in await asyncio.to_thread(self.store.open_batches, self._engine_facts):
            self.submit(identifier)

    @property
    def engine_facts(self) -> str | None:
        """What decides the answers, hashed; None before the service has started."""
        return self._engine_facts

    def submit(self, identifier: str) -> None:
        task = asyncio.create_task(self._run(identifier), name=identifier)
        self._tasks[identifier] = task
        task.add_done_callback(lambda _: self._tasks.pop(identifier, None))

    async def stop(self) -> None:
        """What runs stays open, for the next start."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, identifier: str) -> None:
        try:
            async with self._places:
                await self._run_now(identifier)
        except RowFileError as failed:
            # Locked: another API server of this machine has it. Full: it stays open, for a start with more room.
            _log.warning("Batch %s does not run here: %s", identifier, failed)
        except EngineStoppedError as stopped:
            _log.error("Batch %s stopped and goes on when the server starts again: %s", identifier, stopped)
        except Exception:
            _log.exception("Batch %s failed", identifier)
            self._fail(identifier, "server_error", "the server could not run the batch; its log says why")

    async def _run_now(self, identifier: str) -> None:
        batch = self.store.batch(identifier)
        if batch["status"] not in OPEN:
            return
        try:
            self.store.file(batch["input_file_id"])
            source = await asyncio.to_thread(FileSource, self.store.file_path(batch["input_file_id"]))
        except NotStoredError:
            self._fail(identifier, "invalid_input_file", f"file {batch['input_file_id']} is gone", "input_file_id")
            return
        except SourceError as error:
            self._fail(identifier, "invalid_input_file", str(error), "input_file_id")
            return
        with RowFile(self.store.rows_path(identifier), compressed=False) as rows_file:
            finished, counts = await asyncio.to_thread(_finished, rows_file, identifier)
            batch = self.store.update_batch(identifier, ("validating",), status="in_progress", in_progress_at=now())
            rows = read_rows(source.lines(), finished, urls=(batch["endpoint"],))
            try:
                if batch["status"] == "in_progress":
                    await self._answer(identifier, rows, rows_file, source.total, counts)
            except (SourceError, InputChangedError) as error:
                self._fail(identifier, "invalid_input_file", str(error), "input_file_id")
                return
            await asyncio.to_thread(self._finalise, identifier, rows_file, source, counts)
        self.store.rows_path(identifier).unlink(missing_ok=True)

    async def _answer(
        self, identifier: str, rows: Iterator[list[Request | Refused]], output: RowFile, total: int, counts: Counts
    ) -> None:
        """Until every row is answered, the batch is cancelled or its time is over."""

        def count(result: Result) -> None:
            if result.failure is None:
                counts.completed += 1
            else:
                counts.failed += 1

        def publish() -> dict[str, Any]:
            numbers = {"total": total, "completed": counts.completed, "failed": counts.failed}
            return self.store.update_batch(identifier, OPEN, request_counts=numbers)

        in_flight = max(1, self._engine.in_flight // (4 * AT_ONCE))
        job = asyncio.create_task(run_rows(identifier, rows, self._engine.answer, output, in_flight, count))
        try:
            while not job.done():
                batch = await asyncio.to_thread(publish)
                if batch["status"] == "cancelling" or now() >= batch["expires_at"]:
                    break
                await asyncio.wait({job}, timeout=WATCH_SECONDS)
            else:
                job.result()
        finally:
            job.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await job
        await asyncio.to_thread(publish)

    def _finalise(self, identifier: str, rows_file: RowFile, source: FileSource, counts: Counts) -> None:
        """Split the rows into the output and the error file, and close the batch. Again, the same files come of it."""
        batch = self.store.batch(identifier)
        finished, _ = _finished(rows_file, identifier)
        cancelled = batch["status"] == "cancelling"
        unfinished = 0
        if not cancelled:
            for group in read_rows(source.lines(), finished, urls=(batch["endpoint"],)):
                expired = [_expired(row) for row in group]
                rows_file.append(b"".join(refused_result(identifier, row).line for row in expired))
                unfinished += len(expired)
        counts.failed += unfinished
        end = "cancelled" if cancelled else "expired" if unfinished else "completed"
        if end == "completed":
            self.store.update_batch(identifier, ("in_progress",), status="finalizing", finalizing_at=now())
        numbers = {"total": counts.completed + counts.failed, "completed": counts.completed, "failed": counts.failed}
        if cancelled:
            numbers["total"] = source.total
        files = self._split(batch, rows_file)
        closing = {"status": end, f"{end}_at": now(), "request_counts": numbers, **files}
        self.store.update_batch(identifier, OPEN, **closing)

    def _split(self, batch: dict[str, Any], rows_file: RowFile) -> dict[str, str | None]:
        identifier = batch["id"]
        after = batch.get("output_expires_after")
        expires_at = None if after is None else now() + after["seconds"]
        found: dict[str, str | None] = {}
        for field, failed in (("output_file_id", False), ("error_file_id", True)):
            scratch, size = self.store.scratch_path(), 0
            with scratch.open("wb") as file:
                for line in rows_file.lines():
                    if decode_finished(line).failed == failed:
                        size += file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if size == 0:
                scratch.unlink()
                found[field] = None
                continue
            name = f"{identifier}_{'error' if failed else 'output'}.jsonl"
            # Of the batch's id: whoever finishes what a kill interrupted makes the same file again.
            file_id = f"file-{sha256(name.encode()).hexdigest()[:24]}"
            self.store.add_file(scratch, name, "batch_output", expires_at, file_id)
            found[field] = file_id
        return found

    def _fail(self, identifier: str, code: str, message: str, param: str | None = None) -> None:
        error = {"code": code, "message": message, "param": param, "line": None}
        errors = {"object": "list", "data": [error]}
        self.store.update_batch(identifier, OPEN, status="failed", failed_at=now(), errors=errors)


def _finished(rows_file: RowFile, identifier: str) -> tuple[RowSet, Counts]:
    finished, counts = RowSet(), Counts()
    for line in rows_file.lines():
        decoded = decode_finished(line)
        number = row_number(identifier, decoded.id)
        assert number is not None
        finished.add(number)
        if decoded.failed:
            counts.failed += 1
        else:
            counts.completed += 1
    return finished, counts


def _expired(row: Request | Refused) -> Refused:
    if isinstance(row, Refused):
        return row
    return Refused(row.number, row.custom_id, "batch_expired", f"row {row.number}: the batch's time was over")
