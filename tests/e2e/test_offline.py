"""Served numbers against the oracle, in the eager engine under pressure and in the compiled one."""

import pytest

from tests.e2e import engines
from tests.e2e.cases import PROMPTS, all_specs, direction, long_prompt, prompt_of
from tests.tensors import inline

pytestmark = pytest.mark.engine

BLOCK = 128
OTHER_SITES = {
    "blocks.0.hook_resid_pre",
    "blocks.7.hook_attn_out",
    "blocks.11.mlp.hook_in",
    "blocks.11.hook_mlp_out",
    "blocks.16.mlp.hook_in",
    "blocks.16.hook_mlp_out",
    "blocks.18.mlp.hook_in",
    "blocks.18.hook_mlp_out",
}


@pytest.fixture(scope="module")
def specs(oracle, tokenizer):
    return all_specs(oracle, tokenizer)


@pytest.fixture(scope="module")
def pressed(model_dir, saes, kinds):
    """Eager, prompts in chunks of at most 48 tokens, room for about five sequences of three blocks."""
    llm = engines.start(
        model_dir,
        saes | kinds,
        enforce_eager=True,
        max_num_batched_tokens=48,
        max_num_seqs=16,
        num_gpu_blocks_override=16,
    )
    yield llm
    engines.stop(llm)


def requests(specs, tokenizer, copies=1):
    """(name, spec or None, prompt): every spec, with unsteered requests among them."""
    listed = []
    for i, (name, spec) in enumerate(list(specs.items()) * copies):
        listed.append((name, spec, tokenizer(prompt_of(i))["input_ids"]))
        if i % 6 == 5:
            listed.append(("unsteered", None, tokenizer(prompt_of(i))["input_ids"]))
    return listed


def run_and_compare(llm, oracle, listed):
    outputs = engines.generate(llm, [p for _, _, p in listed], [engines.params(spec) for _, spec, _ in listed])
    failures = []
    for (name, spec, _), output in zip(listed, outputs, strict=True):
        try:
            engines.assert_matches_oracle(oracle, output, spec)
            if spec is None:
                assert not hasattr(output, "steering")
            else:
                engines.assert_receipt(oracle, output, spec)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)
    return outputs


def test_every_spec_moves_the_model(oracle, specs, tokenizer):
    """Otherwise agreement with the oracle would prove nothing."""
    for i, (name, spec) in enumerate(specs.items()):
        prompt = tokenizer(prompt_of(i))["input_ids"]
        # The prompt's last four tokens stand in for generated ones, so that every phase has something to act on.
        steered, plain = (oracle.logprobs(prompt, len(prompt) - 4, s) for s in (spec, None))
        likely = steered.topk(3, dim=-1).indices
        moved = (steered - plain).gather(-1, likely).abs().max()
        assert moved > 10 * engines.LOGPROB_TOLERANCE, name


def test_mixed_batches_match_the_oracle(pressed, oracle, specs, tokenizer):
    """Every op and option, 16 at a time, differently steered and unsteered requests in one batch."""
    run_and_compare(pressed, oracle, requests(specs, tokenizer))


def test_chunked_prompts_and_preemption_match_the_oracle(pressed, oracle, specs, tokenizer):
    """Prompts of two blocks that outgrow them: chunks of 48 tokens, then preemption and recomputation."""
    names = ["smollm2-135m/l15 set", "test/jumprelu min", "add", "generation only", "prompt only", "preserve_norm",
             "eight features and a vector", "cap", "all kinds together", "two conditions"]  # fmt: skip
    listed = [(name, specs[name], long_prompt(tokenizer, 225 + 3 * i, i)) for i, name in enumerate(names)]
    listed.append(("unsteered", None, long_prompt(tokenizer, 230, 5)))
    before = preemptions(pressed)
    run_and_compare(pressed, oracle, listed)
    assert preemptions(pressed) > before, "nothing was preempted: the test has lost its pressure"


def preemptions(llm):
    return next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_several_choices_match_the_oracle(pressed, oracle, specs, tokenizer):
    spec = specs["eight features and a vector"]
    prompt = tokenizer(PROMPTS[2])["input_ids"]
    sampling = engines.params(spec, n=3, temperature=0.8, seed=7, max_tokens=24)
    (output,) = engines.generate(pressed, [prompt], [sampling])
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3
    for choice in range(3):
        engines.assert_matches_oracle(oracle, output, spec, greedy=False, choice=choice)
    vector = output.steering["applied"][-1]
    assert vector["tokens"] + vector["cached"] == 3 * 23


def test_prefix_cache_in_all_directions(pressed, oracle, specs, tokenizer):
    """Unsteered and steered traffic never share blocks, different steerings neither, identical ones do."""
    prompt = long_prompt(tokenizer, 2 * BLOCK + 20)
    one, other = specs["add"], {"vectors": [specs["add"]["vectors"][0] | {"strength": 2.5}]}
    expected_hits = [
        (None, 0),
        (None, 2 * BLOCK),
        (one, 0),
        (one, 2 * BLOCK),
        (None, 2 * BLOCK),
        (other, 0),
        (one, 2 * BLOCK),
        (specs["generation only"], 2 * BLOCK),
        (specs["prompt only"] | {"vectors": specs["add"]["vectors"]}, 2 * BLOCK),
        (specs["add"] | {"when": specs["two conditions"]["when"][1:]}, 0),
        (specs["add"] | {"when": specs["two conditions"]["when"][1:]}, 2 * BLOCK),
    ]
    for step, (spec, hits) in enumerate(expected_hits):
        (output,) = engines.generate(pressed, [prompt], [engines.params(spec, max_tokens=16)])
        assert output.num_cached_tokens == hits, f"step {step}"
        engines.assert_matches_oracle(oracle, output, spec)
        if spec is not None:
            engines.assert_receipt(oracle, output, spec, cached=hits)


def test_steered_first_then_unsteered(pressed, oracle, specs, tokenizer):
    """The other order, on a prompt that nobody has cached."""
    prompt = long_prompt(tokenizer, BLOCK + 40, start=3)
    for spec in (specs["test/jumprelu min"], None):
        (output,) = engines.generate(pressed, [prompt], [engines.params(spec, max_tokens=16)])
        assert output.num_cached_tokens == 0
        engines.assert_matches_oracle(oracle, output, spec)


def test_generated_blocks_are_keyed_by_where_generation_began(pressed, oracle, tokenizer):
    """A second turn: the first answer, steered in generation only, is prompt now and not what the cache holds."""
    spec = {
        "vectors": [{"data": inline(direction(9, 8.0)), "layers": [10], "strength": 3.0}],
        "apply": {"phase": "generation"},
    }
    prompt = long_prompt(tokenizer, BLOCK - 20, start=1)
    (first,) = engines.generate(pressed, [prompt], [engines.params(spec)])
    second_prompt = [*prompt, *first.outputs[0].token_ids]
    (second,) = engines.generate(pressed, [second_prompt], [engines.params(spec, max_tokens=16)])
    assert second.num_cached_tokens == 0
    engines.assert_matches_oracle(oracle, second, spec)


def test_bad_steering_is_refused_and_disturbs_nobody(pressed, oracle, specs, tokenizer):
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    with pytest.raises(
        ValueError, match=r"steering.features\[0\].sae 'nope' is not known here; known SAEs: kind/abstopk"
    ):
        engines.generate(
            pressed, [prompt], [engines.params({"features": [{"sae": "nope", "index": 0, "op": "ablate"}]})]
        )
    run_and_compare(pressed, oracle, [("add", specs["add"], prompt), ("unsteered", None, prompt)])


@pytest.fixture(scope="module")
def compiled(model_dir, saes, kinds, pressed):
    """torch.compile on, everything else as vLLM has it. After the eager engine: two at once starve each other."""
    engines.stop(pressed)
    llm = engines.start(model_dir, saes | kinds, max_num_seqs=32)
    yield llm
    engines.stop(llm)


def test_compiled_mixed_batches_match_the_oracle(compiled, oracle, specs, tokenizer):
    (checks,) = compiled.collective_rpc("steering_self_test")
    assert len(checks) == 30 + len(OTHER_SITES)
    assert {check["site"] for check in checks} >= OTHER_SITES
    assert all(check["passed"] and check["compiled_error"] < 1e-3 for check in checks)
    run_and_compare(compiled, oracle, requests(specs, tokenizer))


def test_compiled_prefix_cache_hits_match_the_oracle(compiled, oracle, specs, tokenizer):
    prompt = long_prompt(tokenizer, 2 * BLOCK + 9)
    spec = specs["eight features and a vector"]
    for hits in (0, 2 * BLOCK):
        (output,) = engines.generate(compiled, [prompt], [engines.params(spec)])
        assert output.num_cached_tokens == hits
        engines.assert_matches_oracle(oracle, output, spec)
        engines.assert_receipt(oracle, output, spec, cached=hits)
