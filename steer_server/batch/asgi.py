"""Requests to an application in this very process: no socket, and the same code as over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from steer_server.batch.rows import Answer


async def ask(app: Any, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
    """What the ASGI application `app` answers. Cancelling this is to the application as a client that went away."""
    sent = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
        "client": ("batch", 0),
        "server": ("batch", 0),
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    status, retry_after = 0, None
    pieces: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        # The client stays until it is answered; the call that waits here is cancelled when the answer is complete.
        await asyncio.get_running_loop().create_future()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, retry_after
        if message["type"] == "http.response.start":
            status = message["status"]
            given = dict(message.get("headers", ())).get(b"retry-after", b"").decode()
            retry_after = float(given) if given.isdecimal() else None
        elif message["type"] == "http.response.body":
            pieces.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        # Starlette answers with a 500 and raises once more, for servers to log.
        if not status:
            raise
    return Answer(status, b"".join(pieces), retry_after)
