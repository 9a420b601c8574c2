"""Plain `vllm serve` with the plugin named in VLLM_PLUGINS, and a row bank that is too small for its traffic."""

import json
import sys
import time
from pathlib import Path

import openai
import pytest

from tests.e2e import servers

pytestmark = pytest.mark.engine

SAE = "smollm2-135m/l15"
MESSAGES = [{"role": "user", "content": "Write a long story about a lighthouse."}]


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_dir):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    vllm = Path(sys.executable).with_name("vllm")
    steering = {"steering": {"layers": [15, 16], "max_edits": 4, "rows": 12}}
    command = [
        str(vllm), "serve", str(model_dir), "--served-model-name", "base", "--dtype", "float32",
        "--max-model-len", "8192", "--enforce-eager", "--additional-config", json.dumps(steering),
    ]  # fmt: skip
    with servers.running(command, log, {"VLLM_PLUGINS": "steer_server"}) as running:
        yield running


def spec(*features):
    return {"features": [{"sae": SAE, "index": i, "op": "set", "value": 20.0} for i in features]}


def ask(server, steering, **settings):
    client = server.client.chat.completions
    body = {"steering": steering, "ignore_eos": True}
    return client.create(model="base", messages=MESSAGES, extra_body=body, **settings)


def test_it_is_the_same_server(server):
    described = server.get("/v1/steering/capabilities").json()
    assert (described["layers"], described["limits"]["rows"]) == ([15, 16], 12)
    answer = ask(server, spec(3), max_tokens=4)
    assert answer.steering["applied"][0]["tokens"] > 0
    with pytest.raises(openai.NotFoundError):
        ask(server, {"features": [{"sae": "x", "index": 0, "op": "ablate"}]})


def test_no_room_is_a_429_with_retry_after_and_room_comes_back(server):
    # So many tokens that it lasts for minutes on any machine, and holds 8 of the 12 rows until it is cancelled.
    holder = ask(server, spec(1, 2, 3, 4), max_tokens=8000, stream=True)
    next(holder)
    ask(server, spec(5, 6), max_tokens=1)
    with pytest.raises(openai.RateLimitError) as refused:
        ask(server, spec(5, 6, 7), max_tokens=1)
    assert refused.value.response.headers["retry-after"] == "1"
    assert refused.value.param == "steering"
    assert "8 of 12 are in use" in refused.value.message
    with pytest.raises(openai.RateLimitError):
        ask(server, spec(5, 6, 7), max_tokens=1, stream=True)
    # What is steered alike needs no more rows, what is not steered needs none.
    ask(server, spec(1, 2, 3, 4), max_tokens=1)
    server.client.chat.completions.create(model="base", messages=MESSAGES, max_tokens=1)
    assert not next(holder).choices[0].finish_reason
    holder.close()
    deadline = time.monotonic() + 60
    while True:
        try:
            assert ask(server, spec(5, 6, 7), max_tokens=2).steering["applied"]
            break
        except openai.RateLimitError:
            assert time.monotonic() < deadline, "the cancelled request never gave its rows back"
            time.sleep(0.1)
