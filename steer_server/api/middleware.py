"""What must see every request: steering on a route that cannot carry it is an error, never ignored."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer_server.api.carriers import FIELD, admitted_fingerprint, carried
from steer_server.api.errors import error_response
from steer_server.spec import SteeringError

STEERABLE = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
FINGERPRINT_HEADER = "X-Steering-Fingerprint"


class SteeringMiddleware:
    """Refuses steering where nothing would read it, and names the fingerprint in the headers of steered responses."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif _route_path(scope) in STEERABLE:
            await self._steerable(scope, receive, send)
        else:
            await self._unsteerable(scope, receive, send)

    async def _steerable(self, scope: Scope, receive: Receive, send: Send) -> None:
        fingerprints: list[str] = []
        token = admitted_fingerprint.set(fingerprints)

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and fingerprints:
                MutableHeaders(scope=message)[FINGERPRINT_HEADER] = fingerprints[0]
            await send(message)

        try:
            await self.app(scope, receive, send_with_header)
        finally:
            admitted_fingerprint.reset(token)

    async def _unsteerable(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "json" not in Headers(scope=scope).get("content-type", ""):
            await self.app(scope, receive, send)
            return
        messages: list[MutableMapping[str, Any]] = []
        while not messages or (messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False)):
            messages.append(await receive())
        error = _steering_in(b"".join(m.get("body", b"") for m in messages), _route_path(scope))
        if error is not None:
            await error_response(error)(scope, receive, send)
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)


def _route_path(scope: Scope) -> str:
    """The path below the application's root path, as routes are written (ASGI: `path` includes `root_path`)."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def _steering_in(body: bytes, path: str) -> SteeringError | None:
    if f'"{FIELD}"'.encode() not in body:
        return None
    try:
        decoded = json.loads(body)
        found = carried(decoded) if isinstance(decoded, dict) else None
    except SteeringError as error:
        return error
    except (ValueError, RecursionError):
        return None
    if found is None:
        return None
    return SteeringError(f"{path} cannot be steered; these can: {', '.join(STEERABLE)}", found[1])
