"""An application asked in its own process, as it would be over HTTP."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from steer_server.batch.asgi import ask
from steer_server.batch.engines import LocalEngine, served_facts
from steer_server.batch.rows import Answer, Request
from steer_server.batch.runner import EngineStoppedError

left = []


async def echo(request):
    headers = {name: request.headers.get(name) for name in ("content-type", "authorization", "x-request-id")}
    return JSONResponse({"body": (await request.body()).decode(), "headers": headers, "path": request.url.path})


async def full(request):
    return JSONResponse({}, status_code=429, headers={"Retry-After": "7"})


async def broken(request):
    raise RuntimeError("a fault of the server's")


async def slow(request):
    try:
        await request.body()
        assert (await request.receive())["type"] == "never"
    except asyncio.CancelledError:
        left.append(1)
        raise


class Engine:
    errored = False


@pytest.fixture
def app():
    handlers = {"/v1/completions": echo, "/full": full, "/broken": broken, "/slow": slow}
    built = Starlette(routes=[Route(path, handler, methods=["POST"]) for path, handler in handlers.items()])
    built.state.engine_client = Engine()
    return built


async def test_body_and_headers_arrive(app):
    body = '{"a": "é"}'.encode()
    answer = await ask(app, "POST", "/v1/completions", body, {"authorization": "Bearer key"})
    assert answer.status == 200
    assert json.loads(answer.body) == {
        "body": '{"a": "é"}',
        "headers": {"content-type": "application/json", "authorization": "Bearer key", "x-request-id": None},
        "path": "/v1/completions",
    }


async def test_status_and_retry_after(app):
    assert await ask(app, "POST", "/full") == Answer(429, b"{}", 7.0)
    assert (await ask(app, "POST", "/nowhere")).status == 404


async def test_a_fault_is_a_500_as_over_http(app):
    assert (await ask(app, "POST", "/broken")).status == 500


async def test_the_client_stays_until_it_is_answered_or_cancelled(app):
    left.clear()
    task = asyncio.create_task(ask(app, "POST", "/slow"))
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left == [1]


async def test_an_engine_that_died_stops_the_job_and_fails_no_row(app):
    engine = LocalEngine(app, {}, 8, {})
    assert engine.in_flight == 16
    row = Request(1, "a", "/broken", b"{}")
    assert (await engine.answer(row)).status == 500
    app.state.engine_client.errored = True
    with pytest.raises(EngineStoppedError):
        await engine.answer(row)


def test_facts_leave_out_what_changes_from_start_to_start():
    capabilities = Answer(200, json.dumps({"layers": [1], "saes": [{"name": "s", "sha256": "x", "k": 3}]}).encode())
    card = {"id": "m", "root": "/m", "parent": None, "max_model_len": 9}
    facts = [
        served_facts(Answer(200, json.dumps({"data": [card | {"created": created}]}).encode()), capabilities)
        for created in (1, 2)
    ]
    assert facts[0] == facts[1] == {"served": [card], "layers": [1], "saes": {"s": "x"}, "presets": None}
    with pytest.raises(EngineStoppedError, match="is it a Steer Server"):
        served_facts(Answer(200, b'{"data": []}'), Answer(404, b""))
