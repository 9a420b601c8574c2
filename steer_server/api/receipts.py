"""Receipts into responses: a field of the body, or of the last event of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from steer_server.engine.admission import AdmittedSteering

DONE = "data: [DONE]\n\n"
COMPLETED = ("response.completed", "response.incomplete", "response.failed")


def attach_receipt(result: Any, admitted: AdmittedSteering) -> Any:
    """What a serving handler returned, with the receipt: a response, a stream of events, or an error left as it is."""
    if isinstance(result, AsyncGenerator):
        return _with_receipt(result, admitted)
    if not hasattr(result, "error") or hasattr(result, "output"):
        result.steering = admitted.receipt().as_json()
    return result


async def _with_receipt(events: AsyncGenerator[Any, None], admitted: AdmittedSteering) -> AsyncGenerator[Any, None]:
    held: str | None = None
    async with aclosing(events):
        async for event in events:
            if not isinstance(event, str):
                if getattr(event, "type", None) in COMPLETED:
                    event.response.steering = admitted.receipt().as_json()
                yield event
                continue
            if held is not None:
                yield _add_field(held, admitted) if event == DONE else held
                held = None
            # Only an event that may be the last one waits for its successor; tokens pass at once.
            if _may_be_last(event):
                held = event
            else:
                yield event
    if held is not None:
        yield held


def _may_be_last(event: str) -> bool:
    """Whether a chunk ends a choice or carries only usage. Inside of JSON strings these quotes would be escaped."""
    return '"finish_reason":"' in event or '"choices":[]' in event


def _add_field(event: str, admitted: AdmittedSteering) -> str:
    chunk = json.loads(event.removeprefix("data: "))
    if "error" in chunk:
        return event
    chunk["steering"] = admitted.receipt().as_json()
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
