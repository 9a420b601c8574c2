"""What answers the rows of a job: an engine in this process, or servers elsewhere."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec

from steer_server.batch.asgi import ask
from steer_server.batch.rows import OK, Answer, Request
from steer_server.batch.runner import EngineStoppedError

CAPABILITIES = "/v1/steering/capabilities"
MODELS = "/v1/models"
QUEUE_FACTOR = 2
"""Rows in flight for each that the engine can run at once: the next ones must wait where the scheduler sees them."""

SERVER_IN_FLIGHT = 64
RECONNECT_SECONDS = 300.0


class Engine(Protocol):
    """in_flight: rows to ask for at a time, where the user does not say."""

    in_flight: int

    async def facts(self) -> dict[str, Any]:
        """What decides the answers: the model, SAEs, presets. JSON-able, the same at each start."""
        ...

    async def answer(self, row: Request) -> Answer:
        """Raises EngineStoppedError."""
        ...


class LocalEngine:
    """The application that `vllm serve` would serve, asked in its own process."""

    def __init__(self, app: Any, model: dict[str, Any], max_num_seqs: int, headers: dict[str, str]) -> None:
        """model: what is known of the model's files. headers: that each request needs, such as an API key."""
        self.in_flight = QUEUE_FACTOR * max_num_seqs
        self._app = app
        self._model = model
        self._headers = headers

    async def facts(self) -> dict[str, Any]:
        answers = [await ask(self._app, "GET", path, headers=self._headers) for path in (MODELS, CAPABILITIES)]
        return {"model": self._model, **served_facts(*answers)}

    async def answer(self, row: Request) -> Answer:
        headers = {**self._headers, "x-request-id": f"row-{row.number}"}
        answer = await ask(self._app, "POST", row.url, row.body, headers)
        if answer.status >= 500 and self._app.state.engine_client.errored:
            raise EngineStoppedError("the engine died; its log says why")
        return answer


class ServerEngine:
    """A running server, or a router before several."""

    in_flight = SERVER_IN_FLIGHT

    def __init__(self, client: Any) -> None:
        self._client = client

    async def facts(self) -> dict[str, Any]:
        models, capabilities = [await self._send("GET", path, b"", {}) for path in (MODELS, CAPABILITIES)]
        if models.status == 401:
            raise EngineStoppedError("the server wants an API key; set OPENAI_API_KEY")
        return served_facts(models, capabilities)

    async def answer(self, row: Request) -> Answer:
        return await self._send("POST", row.url, row.body, {"content-type": "application/json"})

    async def _send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        import httpx

        since: float | None = None
        while True:
            try:
                answer = await self._client.request(method, path, content=body, headers=headers)
            except httpx.TransportError as error:
                since = time.monotonic() if since is None else since
                if time.monotonic() - since >= RECONNECT_SECONDS:
                    raise EngineStoppedError(f"{self._client.base_url} does not answer: {error!r}") from None
                await asyncio.sleep(2.0)
                continue
            given = answer.headers.get("retry-after", "")
            return Answer(answer.status_code, answer.content, float(given) if given.isdecimal() else None)


def served_facts(models: Answer, capabilities: Answer) -> dict[str, Any]:
    """What a server says about what it serves, without what changes from start to start."""
    if models.status != OK:
        raise EngineStoppedError(f"{MODELS} answered {models.status}: {models.body[:200].decode(errors='replace')}")
    if capabilities.status != OK:
        raise EngineStoppedError(f"{CAPABILITIES} answered {capabilities.status}; is it a Steer Server?")
    served = msgspec.json.decode(models.body)["data"]
    described = msgspec.json.decode(capabilities.body)
    return {
        "served": [{name: card.get(name) for name in ("id", "root", "parent", "max_model_len")} for card in served],
        "layers": described["layers"],
        "saes": {sae["name"]: sae["sha256"] for sae in described["saes"]},
        "presets": described.get("presets"),
    }


@asynccontextmanager
async def local_engine(arguments: list[str]) -> AsyncIterator[LocalEngine]:
    """The engine of `vllm serve *arguments`."""
    from steer_server.batch.model_files import model_facts
    from steer_server.engine.vllm_compat.serving_app import serving_app

    async with serving_app(arguments) as serving:
        model = await asyncio.to_thread(model_facts, serving.model)
        headers = {"authorization": f"Bearer {serving.api_key}"} if serving.api_key else {}
        yield LocalEngine(serving.app, model, serving.max_num_seqs, headers)


@asynccontextmanager
async def server_engine(url: str, in_flight: int | None) -> AsyncIterator[ServerEngine]:
    """url: of the server, with or without /v1."""
    import httpx

    key = os.environ.get("OPENAI_API_KEY")
    async with httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(None, connect=30.0),
        limits=httpx.Limits(max_connections=in_flight or SERVER_IN_FLIGHT),
    ) as client:
        yield ServerEngine(client)
