"""Real vLLM engines with the plugin, and the comparison of what they return with the oracle."""

import gc

from vllm import LLM, SamplingParams

MAX_TOKENS = 64
LOGPROB_TOLERANCE = 1e-3


def start(model_dir, saes, **options):
    """An engine of the embedded model in fp32 that knows the test SAEs."""
    shipped = {"smollm2-135m/l15"}
    steering = {"saes": {name: path for name, path in saes.items() if name not in shipped}} | options.pop(
        "steering", {}
    )
    settings = {"dtype": "float32", "max_model_len": 1024, "seed": 0, "disable_log_stats": False}
    return LLM(str(model_dir), additional_config={"steering": steering}, **(settings | options))


def stop(llm):
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def params(spec=None, **settings):
    """Greedy unless told otherwise, with the log-probabilities that the comparison needs."""
    defaults = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "logprobs": 3, "ignore_eos": True}
    return SamplingParams(**(defaults | settings), extra_args=None if spec is None else {"steering": spec})


def generate(llm, prompts, param_list):
    """Outputs for prompts of token ids, in one batch."""
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], param_list, use_tqdm=False)


def assert_matches_oracle(oracle, output, spec, greedy=True, choice=0):
    """Every returned log-probability within 1e-3 of the oracle's, every greedy token its most likely one.

    The oracle reads the engine's own tokens, so agreement at each step is agreement of the whole greedy text. Tokens
    that the oracle itself puts within the tolerance of each other are equally greedy.
    """
    completion = output.outputs[choice]
    prompt, generated = list(output.prompt_token_ids), list(completion.token_ids)
    logprobs = oracle.logprobs([*prompt, *generated[:-1]], len(prompt), spec)[len(prompt) - 1 :]
    worst = 0.0
    for step, (token, returned) in enumerate(zip(generated, completion.logprobs, strict=True)):
        if greedy:
            behind = float(logprobs[step].max() - logprobs[step, token])
            assert behind <= LOGPROB_TOLERANCE, f"step {step}: another greedy token, {behind:.2e} ahead"
        for candidate, entry in returned.items():
            worst = max(worst, abs(entry.logprob - float(logprobs[step, candidate])))
    assert worst <= LOGPROB_TOLERANCE, f"log-probabilities off by {worst:.2e}"
    return worst


def targeted(spec, entry, prompt_len, length, sae_skip=0):
    """Which of `length` positions an entry targets, from the definition of `apply`."""
    apply = spec.get("apply", {}) | entry.get("apply", {})
    skip = apply.get("skip_first", sae_skip)
    phase = apply.get("phase", "all")
    return [
        position
        for position in range(length)
        if position >= skip and (phase == "all" or (position < prompt_len) == (phase == "prompt"))
    ]


def assert_receipt(oracle, output, spec, cached=None):
    """The receipt names every entry and accounts for every targeted token; `cached`: prompt tokens from the cache."""
    entries = [*spec.get("features", []), *spec.get("vectors", [])]
    receipt = output.steering
    assert len(receipt["applied"]) == len(entries)
    prompt_len = len(output.prompt_token_ids)
    length = prompt_len + len(output.outputs[0].token_ids) - 1
    held = None
    if spec.get("when"):
        oracle.logprobs([*output.prompt_token_ids, *output.outputs[0].token_ids][:length], prompt_len, spec)
        held = oracle.held
    for line, entry in zip(receipt["applied"], entries, strict=True):
        skip = oracle.saes[entry["sae"]].skip_first if "sae" in entry else 0
        assert line["op"] == entry.get("op", "add")
        positions = targeted(spec, entry, prompt_len, length, skip)
        assert line["tokens"] + line.get("closed", 0) + line["cached"] == len(positions)
        if cached is not None:
            assert line["cached"] == len(targeted(spec, entry, prompt_len, cached, skip))
        assert ("closed" in line) == (held is not None)
        if held is not None:
            computed = positions[line["cached"] :]
            assert line["tokens"] == int(held[computed].sum())


def replays(llm) -> tuple[int, int]:
    """Forwards of a V2 runner so far that were replayed whole: from vLLM's graphs, and from those of steered ones."""

    def counted(worker):
        import emulated_graphs

        return dict(emulated_graphs.replays)

    (found,) = llm.collective_rpc(counted)
    return found.get("BatchExecutionDescriptor", 0), found.get("SteeredBatchExecutionDescriptor", 0)
