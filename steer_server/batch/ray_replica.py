"""One engine of a job on Ray Data: an actor of a `map_batches` stage."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from steer_server.batch.engines import LocalEngine, local_engine
from steer_server.batch.job import JobError, differences
from steer_server.batch.rows import Request, Result, answered_result
from steer_server.batch.runner import answer_patiently

RESULT_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("line", pa.binary()),
        ("failure", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("steered_tokens", pa.int64()),
    ]
)


class Replica:
    """Answers batches of rows, all of a batch at once, with an engine that starts with the first of them."""

    def __init__(self, arguments: list[str], environment: dict[str, str], job: str, facts: str) -> None:
        """arguments: of `vllm serve`. facts: file that says what every replica of the job must serve."""
        os.environ.update(environment)
        self._arguments = arguments
        self._job = job
        self._facts = Path(facts)
        self._stack = contextlib.AsyncExitStack()
        self._starting = asyncio.Lock()
        self._engine: LocalEngine | None = None

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """batch: columns number, custom_id, url, body. Yields one table of RESULT_SCHEMA."""
        async with self._starting:
            if self._engine is None:
                engine = await self._stack.enter_async_context(local_engine(self._arguments))
                agree_on(self._facts, await engine.facts())
                self._engine = engine
        rows = [Request(**row) for row in batch.to_pylist()]
        results = await asyncio.gather(*(self._answer(self._engine, row) for row in rows))
        yield pa.Table.from_pylist([_as_row(result) for result in results], RESULT_SCHEMA)

    async def _answer(self, engine: LocalEngine, row: Request) -> Result:
        return answered_result(self._job, row, await answer_patiently(engine.answer, row))


def _as_row(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in RESULT_SCHEMA.names}


def agree_on(path: Path, facts: dict[str, Any]) -> None:
    """The first replica writes what it serves into `path`; the others must serve the same. Raises JobError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(facts))
    try:
        os.link(aside, path)
    except FileExistsError:
        changed = differences(json.loads(path.read_text()), facts, "engine.")
        if changed:
            raise JobError(f"this worker would answer otherwise than the job's others: {'; '.join(changed)}") from None
    finally:
        aside.unlink()
