"""The mixed lines that batches are tried with, the command that answers them, and what a server says of them online."""

import asyncio
import json
import subprocess

import httpx

from tests.e2e import servers
from tests.e2e.cases import PROMPTS, direction
from tests.tensors import inline

MODEL = "smollm2"
SAE = "smollm2-135m/l15"


def specs():
    """Steering of every kind, None among them."""
    vector = {"data": inline(direction(1, 8.0)), "layers": [12]}
    add = vector | {"op": "add", "strength": 2.0}
    feature = {"sae": SAE, "index": 4290, "op": "set", "value": 59}
    return [
        None,
        {"features": [feature]},
        {"features": [{"sae": SAE, "index": 740, "op": "ablate"}]},
        {"features": [feature | {"op": "scale", "value": 0.3}], "apply": {"phase": "generation"}},
        {"vectors": [add]},
        None,
        {"vectors": [add | {"strength": -1.5}], "apply": {"phase": "prompt", "skip_first": 2}},
        {"vectors": [vector | {"op": "project_out"}], "apply": {"preserve_norm": True}},
        {"vectors": [vector | {"op": "cap", "min": -2.0, "max": 2.0}]},
        {"features": [feature], "vectors": [add | {"layers": [3, 20]}]},
        {},
    ]


def row(i):
    """The i-th of the mixed lines: its kind and its steering go round, every 23rd is wrong in some way."""
    text = f"{PROMPTS[i % len(PROMPTS)].split(',')[0]} {i % 50}"
    kinds = [
        ("/v1/completions", {"prompt": text, "max_tokens": 3}),
        ("/v1/completions", {"prompt": [text, f"{text}!"], "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 2}),
        ("/v1/responses", {"input": text, "max_output_tokens": 2}),
    ]
    url, body = kinds[i % 7 if i % 7 < 4 else 0]
    body = {"model": MODEL, "temperature": 0, **body}
    steering = specs()[i % len(specs())]
    if steering is not None:
        body["steering"] = steering
    if i % 23 == 22:
        wrong = [
            {"steering": {"features": [{"sae": SAE, "index": 10**6, "op": "ablate"}]}},
            {"steering": {"featurs": []}},
            {"model": "no-such-model"},
            {"temperature": "hot"},
            {"steering": {"features": [{"sae": "no/such", "index": 1, "op": "ablate"}]}},
        ]
        body |= wrong[i // 23 % len(wrong)]
    return {"custom_id": f"row-{i}", "method": "POST", "url": url, "body": body}


def batch(*arguments, **options):
    command = servers.steer_server("batch", *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)


def summary_of(ran):
    # Not of necessity the last line: an engine that ends may print after it.
    (summary,) = [event for event in map(json.loads, ran.stderr.splitlines()) if event["event"] == "summary"]
    return summary


def comparable(body):
    """An answer without what differs from one request to the next: ids, times, and where tokens were computed."""
    if "error" in body and body.get("object") != "response":
        return body
    kept = {}
    if "choices" in body:
        kept["texts"] = [
            (choice["message"]["content"] if "message" in choice else choice["text"], choice["finish_reason"])
            for choice in body["choices"]
        ]
    else:
        kept["texts"] = [part["text"] for item in body["output"] for part in item["content"]]
    usage = body["usage"]
    kept["usage"] = [
        usage.get(name) for name in ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")
    ]
    if "steering" in body:
        receipt = body["steering"]
        kept["steering"] = receipt | {
            "applied": [
                entry | {"tokens": entry["tokens"] + entry["cached"], "cached": 0} for entry in receipt["applied"]
            ]
        }
    return kept


def online(server, rows):
    """(status, body) of each row by custom_id, asked over HTTP by a client that knows nothing of batches."""

    async def ask_all():
        places, answers = asyncio.Semaphore(48), {}
        async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:

            async def ask(one):
                async with places:
                    answer = await client.post(one["url"], json=one["body"])
                answers[one["custom_id"]] = (answer.status_code, answer.json())

            await asyncio.gather(*map(ask, rows))
        return answers

    return asyncio.run(ask_all())


def assert_same(rows, answers):
    """Rows of an output, and what the server said online."""
    by_id = {one["custom_id"]: one for one in rows}
    assert len(by_id) == len(rows)
    assert by_id.keys() == answers.keys()
    for custom_id, (status, body) in answers.items():
        response = by_id[custom_id]["response"]
        assert by_id[custom_id]["error"] is None
        assert response["status_code"] == status, custom_id
        assert comparable(response["body"]) == comparable(body), custom_id
