"""`steer-server serve`, driven with the openai package: carriers, receipts, errors, and that nothing can hurt it."""

import asyncio
import json
import random

import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e2e import readme, servers
from tests.e2e.cases import direction
from tests.tensors import inline

pytestmark = pytest.mark.engine

MODEL = "smollm2"
SAE = "smollm2-135m/l15"
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
ADD = {"vectors": [{"data": inline(direction(1, 8.0)), "layers": [12], "op": "add", "strength": 2.0}]}
FEATURE = {"features": [{"sae": SAE, "index": 7, "op": "set", "value": 30.0}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory, saes):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = servers.steer_server(
        "serve", "--sae", f"test/jumprelu={saes['test/jumprelu']}", "--enforce-eager", "--max-num-seqs", "32"
    )
    with servers.running(command, log) as running:
        yield running


def chat(server, steering=None, **settings):
    body = {} if steering is None else {"steering": steering}
    defaults = {"temperature": 0, "max_tokens": 12}
    return server.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, extra_body=body, **(defaults | settings)
    )


def assert_accounts_for(receipt, positions, skip=0):
    (line,) = receipt["applied"]
    assert line["tokens"] + line["cached"] == positions - skip
    assert receipt["fingerprint"].startswith("sha256:")


def test_startup_says_what_is_armed(server):
    log = server.log.read_text()
    assert "Steering: 30 of 30 decoder layers armed; 3 SAE(s)" in log
    assert "row bank of 2048 rows (32 edits a request)" in log
    assert "Steering self-test passed at 30 layers" in log


def test_capabilities(server):
    described = server.get("/v1/steering/capabilities").json()
    assert described["model"] == MODEL
    assert described["layers"] == list(range(30))
    assert described["hook_points"][15] == "blocks.15.hook_resid_post"
    assert {sae["name"]: (sae["architecture"], sae["layer"]) for sae in described["saes"]} == {
        "smollm2-135m/l12": ("jumprelu", 12),
        SAE: ("topk", 15),
        "test/jumprelu": ("jumprelu", 15),
    }
    assert described["features"]["ops"] == ["set", "add", "min", "max", "scale", "ablate"]
    assert described["when"] == {"ops": [">", ">=", "<", "<="], "scopes": ["token"]}
    assert described["limits"]["max_edits"] == 32
    assert described["limits"]["rows"] == 32 * 32 * 2
    assert described["self_test"] == {"workers": 1, "layers": list(range(30)), "passed": True}


def test_chat(server):
    plain, steered = chat(server), chat(server, ADD)
    assert plain.choices[0].message.content != steered.choices[0].message.content
    assert "steering" not in plain.model_extra
    assert_accounts_for(steered.steering, steered.usage.prompt_tokens + steered.usage.completion_tokens - 1)


def test_a_condition_and_its_opposite_share_the_tokens(server):
    """The feature is read at layer 15 and what it decides about is behind it, so both find the same of the prompt."""
    asked = {"vectors": [ADD["vectors"][0] | {"layers": [20]}]}
    feature = {"sae": SAE, "index": 4290}
    lines = {}
    for op in (">", "<="):
        answer = chat(server, asked | {"when": [{"feature": feature, "op": op, "value": 0.0}]}, max_tokens=1)
        (lines[op],) = answer.steering["applied"]
        tokens = lines[op]["tokens"] + lines[op]["closed"] + lines[op]["cached"]
        assert tokens == answer.usage.prompt_tokens
    assert lines[">"]["tokens"] == lines["<="]["closed"]
    assert 0 < lines[">"]["tokens"] < answer.usage.prompt_tokens


def test_the_fingerprint_is_in_a_header(server):
    client = server.client.chat.completions.with_raw_response
    for stream in (False, True):
        raw = client.create(
            model=MODEL, messages=MESSAGES, max_tokens=2, stream=stream, extra_body={"steering": FEATURE}
        )
        assert raw.headers["x-steering-fingerprint"] == chat(server, FEATURE).steering["fingerprint"]
    raw = client.create(model=MODEL, messages=MESSAGES, max_tokens=2)
    assert "x-steering-fingerprint" not in raw.headers


@pytest.mark.parametrize("usage", [True, False])
def test_a_streamed_chat_ends_with_the_receipt(server, usage):
    whole = chat(server, ADD)
    chunks = list(chat(server, ADD, stream=True, stream_options={"include_usage": usage}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    with_receipt = [c for c in chunks if "steering" in c.model_extra]
    assert with_receipt == [chunks[-1]]
    positions = whole.usage.prompt_tokens + whole.usage.completion_tokens - 1
    assert_accounts_for(chunks[-1].steering, positions)


def test_streamed_choices_share_one_receipt(server):
    chunks = list(chat(server, ADD, stream=True, n=3, temperature=0.8, seed=1))
    assert [c for c in chunks if "steering" in c.model_extra] == [chunks[-1]]
    (line,) = chunks[-1].steering["applied"]
    prompt = chat(server).usage.prompt_tokens
    assert line["tokens"] + line["cached"] == 3 * (prompt + 11)


def test_a_stop_string_ends_the_count_where_the_text_ends(server):
    text = chat(server, ADD, max_tokens=30).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    stopped = chat(server, ADD, max_tokens=30, stop=stop)
    assert stopped.choices[0].finish_reason == "stop"
    assert_accounts_for(stopped.steering, stopped.usage.prompt_tokens + stopped.usage.completion_tokens - 1)


def test_completions_as_a_list_of_prompts(server, oracle, tokenizer):
    prompts = ["The sea is", "A short poem about rain:"]
    answer = server.client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=8, temperature=0, extra_body={"steering": FEATURE}
    )
    lengths = [len(tokenizer(p)["input_ids"]) for p in prompts]
    assert_accounts_for(answer.steering, sum(lengths) + 2 * 7, skip=2)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        tokens = tokenizer(prompt)["input_ids"]
        expected = greedy(oracle, tokens, FEATURE, 8)
        assert choice.text == tokenizer.decode(expected)


def greedy(oracle, tokens, spec, steps):
    generated = []
    for _ in range(steps):
        generated.append(int(oracle.logprobs([*tokens, *generated], len(tokens), spec)[-1].argmax()))
    return generated


def test_streamed_completion(server):
    chunks = list(
        server.client.completions.create(
            model=MODEL, prompt="The sea is", max_tokens=5, stream=True, extra_body={"steering": ADD}
        )
    )
    assert [c for c in chunks if "steering" in c.model_extra] == [chunks[-1]]


def test_responses(server):
    settings = {"model": MODEL, "input": MESSAGES[0]["content"], "temperature": 0, "max_output_tokens": 12}
    plain = server.client.responses.create(**settings)
    steered = server.client.responses.create(**settings, extra_body={"steering": ADD})
    assert plain.output_text != steered.output_text == chat(server, ADD).choices[0].message.content
    assert_accounts_for(steered.steering, steered.usage.input_tokens + steered.usage.output_tokens - 1)
    events = list(server.client.responses.create(**settings, stream=True, extra_body={"steering": ADD}))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == steered.output_text
    assert_accounts_for(events[-1].response.steering, steered.usage.input_tokens + steered.usage.output_tokens - 1)


def test_steering_as_json_text_in_vllm_xargs(server):
    direct = chat(server, ADD)
    carried = server.client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        extra_body={"vllm_xargs": {"steering": json.dumps(ADD)}},
    )
    assert carried.choices[0].message.content == direct.choices[0].message.content
    assert carried.steering["fingerprint"] == direct.steering["fingerprint"]


def test_a_gateway_may_leave_extra_body_unmerged(server):
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3, "extra_body": {"steering": ADD}}
    assert server.post("/v1/chat/completions", body).json()["steering"]["applied"]


def test_an_sae_whose_card_skips_the_first_token_says_so(server):
    receipt = chat(server, FEATURE).steering
    assert "skips the first 1 token(s)" in receipt["warnings"][0]


def test_an_empty_spec_steers_nothing_and_says_so(server):
    answer = chat(server, {})
    assert answer.choices[0].message.content == chat(server).choices[0].message.content
    assert answer.steering["applied"] == []
    assert "nothing was steered" in answer.steering["warnings"][0]


REFUSED = [
    ({"steering": 5}, 400, "steering", "must be an object"),
    ({"steering": {"featurs": []}}, 400, "steering.featurs", "did you mean 'features'"),
    ({"steering": {"presets": [{"name": "x"}]}}, 400, "steering.presets", "not supported by this version"),
    (
        {"steering": {"features": [{"sae": "no/such", "index": 1, "op": "ablate"}]}},
        404,
        "steering.features[0].sae",
        f"known SAEs: smollm2-135m/l12, {SAE}, test/jumprelu",
    ),
    (
        {"steering": {"features": [{"sae": SAE, "index": 10**6, "op": "ablate"}]}},
        400,
        "steering.features[0].index",
        "0 to 4607",
    ),
    (
        {"steering": {"vectors": [{"data": inline(np.ones(64)), "layers": [12]}]}},
        400,
        "steering.vectors[0].data.shape",
        "64 wide, the model's residual stream is 576",
    ),
    ({"steering": {"vectors": [ADD["vectors"][0] | {"layers": [30]}]}}, 400, "steering.vectors[0].layers[0]", "0-29"),
    ({"steering": {"vectors": [ADD["vectors"][0]] * 33}}, 400, "steering.vectors[32]", "takes 32"),
    (
        {"steering": ADD | {"when": [{"feature": {"sae": SAE, "index": 1}, "op": ">", "value": 0.0}]}},
        400,
        "steering.when[0].feature",
        "read at blocks.15.hook_resid_post",
    ),
    ({"vllm_xargs": {"steering": "{"}}, 400, "vllm_xargs.steering", "must be a JSON object"),
    ({"vllm_xargs": {"steering": 3}}, 400, "vllm_xargs.steering", "must be a JSON string"),
    ({"vllm_xargs": {"steering": '{"a": 1}'}}, 400, "vllm_xargs.steering.a", "not a known key"),
    ({"steering": ADD, "vllm_xargs": {"steering": "{}"}}, 400, "vllm_xargs.steering", "both"),
    ({"steering": ADD, "use_beam_search": True, "n": 2}, 400, "steering", "beam search"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "says"), REFUSED, ids=[p for _, _, p, _ in REFUSED])
@pytest.mark.parametrize("stream", [False, True])
def test_refused_in_openai_shape(server, body, status, param, says, stream):
    """A stream too is refused before it starts, with the same status."""
    answer = server.post(
        "/v1/chat/completions", {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "stream": stream} | body
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (status, param)
    assert error["type"] == {400: "BadRequestError", 404: "NotFoundError"}[status]
    assert says in error["message"]


def test_refusals_are_the_sdks_own_exceptions(server):
    with pytest.raises(openai.NotFoundError) as not_found:
        chat(server, {"features": [{"sae": "no/such", "index": 1, "op": "ablate"}]})
    assert not_found.value.param == "steering.features[0].sae"
    with pytest.raises(openai.BadRequestError):
        list(chat(server, {"nonsense": 1}, stream=True))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_other_routes_refuse_alike(server, path):
    prompt = {"input": "x"} if path.endswith("responses") else {"prompt": "x"}
    answer = server.post(path, {"model": MODEL, "steering": {"x": 1}} | prompt)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steering.x")


def test_background_responses_are_refused(server):
    answer = server.post("/v1/responses", {"model": MODEL, "input": "x", "background": True, "steering": ADD})
    assert answer.status_code == 400
    assert "not supported by this version" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/tokenize", "/v1/chat/completions/batch", "/inference/v1/generate"])
def test_steering_on_a_route_that_cannot_carry_it_is_refused(server, path):
    for body in ({"steering": ADD}, {"vllm_xargs": {"steering": json.dumps(ADD)}}):
        answer = server.post(path, {"model": MODEL, "messages": MESSAGES, "prompt": "x", "max_tokens": 2} | body)
        assert answer.status_code == 400, answer.text
        assert "cannot be steered" in answer.json()["error"]["message"]
    unsteered = server.post("/tokenize", {"model": MODEL, "prompt": 'a text with "steering" in it'})
    assert unsteered.status_code == 200


EXTREMES = [
    {"vectors": [ADD["vectors"][0] | {"strength": 1e5, "layers": list(range(30))}]},
    {"vectors": [ADD["vectors"][0] | {"op": "scale_along", "strength": 1e6, "layers": list(range(30))}]},
    {"vectors": [ADD["vectors"][0] | {"op": "scale_along", "strength": -1e6, "layers": list(range(30))}]},
    {"features": [{"sae": SAE, "index": i, "op": "set", "value": 1e6} for i in range(20)]},
    {"features": [{"sae": SAE, "index": 1, "op": "set", "value": -1e6}], "apply": {"preserve_norm": True}},
]


@pytest.mark.parametrize("spec", EXTREMES)
def test_extreme_but_valid_steering_is_an_answer(server, spec):
    """Edits compound over layers; the logits must stay numbers, which JSON can carry."""
    answer = chat(server, spec, logprobs=True, top_logprobs=3, max_tokens=6)
    assert all(np.isfinite(token.logprob) for token in answer.choices[0].logprobs.content)
    assert answer.steering["applied"][0]["tokens"] + answer.steering["applied"][0]["cached"] > 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=10,
)
mutations = st.lists(
    st.tuples(
        st.sampled_from(["features", "vectors", "apply", "when", "x"]),
        st.sampled_from(["sae", "index", "op", "value", "unit", "data", "layers", "strength", "apply", "phase", "x"]),
        json_values,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(mutations, st.sampled_from(["steering", "text"]))
def test_no_body_makes_a_500(server, changes, carrier):
    """Valid steering with parts replaced by arbitrary JSON: an answer, or a 4xx that names a field."""
    spec = json.loads(json.dumps({**FEATURE, **ADD, "apply": {}}))
    for part, key, value in changes:
        target = spec.get(part)
        if isinstance(target, list) and target and isinstance(target[0], dict):
            target[0][key] = value
        elif isinstance(target, dict):
            target[key] = value
        else:
            spec[part] = value
    body = {"steering": spec} if carrier == "steering" else {"vllm_xargs": {"steering": json.dumps(spec)}}
    answer = server.post("/v1/chat/completions", {"model": MODEL, "messages": MESSAGES, "max_tokens": 1} | body)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["param"].startswith(("steering", "vllm_xargs.steering"))


@pytest.mark.parametrize(
    "content",
    [
        b"{" * 100_000,
        b'{"steering": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"steering": {"features": [{"value": NaN}]}}',
        b"\xff\xfe",
        b"",
    ],
)
def test_broken_bodies_are_client_errors(server, content):
    for path in ("/v1/chat/completions", "/v1/messages", "/tokenize"):
        answer = server.post(path, content=content)
        assert 400 <= answer.status_code < 500, (path, answer.status_code, answer.text[:200])


async def test_concurrent_requests_do_not_disturb_each_other(server):
    """40 requests, eight kinds in random order, some cancelled in mid-stream: each answer is what it is alone."""
    specs = [None, ADD, FEATURE, {}]
    specs += [{"vectors": [ADD["vectors"][0] | {"strength": s, "layers": [8 + 2 * s]}]} for s in range(1, 5)]
    alone = [chat(server, spec).choices[0].message.content for spec in specs]
    order = [i % len(specs) for i in range(40)]
    random.Random(0).shuffle(order)
    client = server.async_client

    async def ask(i, cancel):
        body = {} if specs[i] is None else {"steering": specs[i]}
        settings = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 12, "extra_body": body}
        if cancel:
            stream = await client.chat.completions.create(**settings, stream=True)
            await anext(aiter(stream))
            await stream.close()
            return alone[i]
        return (await client.chat.completions.create(**settings)).choices[0].message.content

    answers = await asyncio.gather(*(ask(i, cancel=n % 7 == 3) for n, i in enumerate(order)))
    assert answers == [alone[i] for i in order]


@pytest.mark.parametrize(
    ("language", "code", "printed"), readme.examples(), ids=["curl", "search", "openai", "conditions"]
)
def test_the_readmes_examples_print_what_it_says(server, language, code, printed):
    assert readme.run(language, code, server.url) == printed


def test_the_server_is_still_well(server):
    """Last: after everything above, healthy and nothing in its log that it did not expect."""
    assert server.get("/health").status_code == 200
    assert "Traceback" not in server.log.read_text()
    assert chat(server, ADD).steering["applied"][0]["tokens"] > 0


def test_features_can_be_searched(server):
    found = server.get(f"/v1/steering/features?sae={SAE}&q=the+sea&limit=3").json()
    assert found["object"] == "list"
    best = found["data"][0]
    assert len(found["data"]) == 3
    assert best["sae"] == SAE
    assert "sea" in best["label"]
    assert best["max_activation"] > 0
    assert 0 < best["density"] < 1
    assert best["suggested"]["low"] < best["suggested"]["high"]
    everywhere = server.get("/v1/steering/features?q=the+sea").json()["data"]
    assert {row["sae"] for row in everywhere} == {SAE, "smollm2-135m/l12"}, "the others have no evidence"
    assert len(everywhere) == 10
    detail = server.get(f"/v1/steering/features/{SAE}/{best['index']}").json()
    assert detail["label"] == best["label"]
    strongest = detail["contexts"][0]
    assert strongest["activations"][strongest["peak"]] == pytest.approx(detail["max_activation"], rel=1e-3)
    assert detail["raised"]


def test_what_is_searched_for_steers(server):
    """From a word to a steered answer, with what the search returned."""
    best = server.get(f"/v1/steering/features?sae={SAE}&q=sea").json()["data"][0]
    value = (best["suggested"]["low"] + best["suggested"]["high"]) / 2
    steering = {"features": [{"sae": best["sae"], "index": best["index"], "op": "set", "value": value}]}
    assert chat(server, steering).choices[0].message.content != chat(server).choices[0].message.content


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("?q=sea&sae=absent", 404, "no SAE 'absent' is served; served: "),
        ("?q=sea&sae=test/jumprelu", 404, "steer-server sae explain"),
        (f"/{SAE}/4608", 404, "features 0 to 4607"),
        ("/absent/0", 404, "no SAE 'absent'"),
        (f"/{SAE}/x", 400, "index"),
        ("", 400, "q"),
        ("?q=sea&limit=0", 400, "limit"),
        ("?q=sea&limit=101", 400, "limit"),
    ],
)
def test_bad_searches(server, path, status, says):
    response = server.get(f"/v1/steering/features{path}")
    assert response.status_code == status, response.text
    assert says in json.dumps(response.json()["error"])


@pytest.mark.parametrize(
    "query", ["%22", "%22%22+AND+%22", "*", "NEAR(", "%00", "'; DROP TABLE features; --", "😀", ""]
)
def test_any_query_is_answered(server, query):
    response = server.get(f"/v1/steering/features?sae={SAE}&q={query}")
    assert response.status_code == 200, response.text
    assert isinstance(response.json()["data"], list)
