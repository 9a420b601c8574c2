"""One model over several workers: split layers (tensor parallel), with LoRA adapters, and stages of layers (pipeline
parallel)."""

import os

import pytest
from vllm.lora.request import LoRARequest

from tests.e2e import engines
from tests.e2e.random_cases import LAYERS, TOLERANCE, compare_all, prompt, start
from tests.e2e.tiny_models import random_adapter
from tests.oracle.hf_oracle import Oracle

pytestmark = pytest.mark.engine

BLOCK = 128
"""Tokens of a block of the prefix cache on the CPU."""


@pytest.fixture
def two_workers():
    """The machine's cores for whoever needs them: vLLM would want a NUMA node for each worker."""
    os.environ.update({"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def adapters(random_model, random_saes, tmp_path_factory):
    """Two LoRA adapters: (what vLLM is asked for, the oracle of the model with it merged in)."""
    made = []
    for number in (1, 2):
        adapter, merged = random_adapter(tmp_path_factory.mktemp("lora"), random_model, seed=number)
        made.append((LoRARequest(f"adapter-{number}", number, str(adapter)), Oracle(merged, random_saes)))
    return made


def test_every_spec_and_adapter_moves_the_model(random_oracle, random_specs, adapters):
    """Otherwise agreement with the oracle would prove nothing."""
    tokens = prompt(7)
    plain = random_oracle.logprobs(tokens, len(tokens) - 4)
    for name, spec in random_specs.items():
        assert (random_oracle.logprobs(tokens, len(tokens) - 4, spec) - plain).abs().max() > 100 * TOLERANCE, name
    first, second = (oracle.logprobs(tokens, len(tokens) - 4) for _, oracle in adapters)
    for one, other in ((first, plain), (second, plain), (first, second)):
        assert (one - other).abs().max() > 100 * TOLERANCE


def test_tensor_parallel_and_adapters(random_model, random_saes, random_oracle, random_specs, adapters, two_workers):
    # A place more than adapters: vLLM 0.32's CPU kernels give a token without one, beside others, the last place's.
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": len(adapters) + 1}
    llm = start(random_model, random_saes, tensor_parallel_size=2, enforce_eager=True, **lora)
    try:
        one, other = llm.collective_rpc("steering_self_test")
        assert [check["site"] for check in one] == [check["site"] for check in other]
        compare_all(llm, random_oracle, random_specs)
        requests = [(None, random_oracle), *adapters]
        mixed_adapters(llm, requests, random_specs)
        cached_adapters(llm, requests, random_specs)
    finally:
        engines.stop(llm)


def mixed_adapters(llm, requests, specs):
    """Every adapter with every spec and with none, in the same batches."""
    listed = [(spec, adapter) for spec in (None, *specs.values()) for adapter in requests]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt(i)} for i in range(len(listed))],
        [engines.params(spec, max_tokens=8, detokenize=False) for spec, _ in listed],
        lora_request=[request for _, (request, _) in listed],
        use_tqdm=False,
    )
    for (spec, (_, oracle)), output in zip(listed, outputs, strict=True):
        assert engines.assert_matches_oracle(oracle, output, spec) < TOLERANCE
        if spec is not None:
            engines.assert_receipt(oracle, output, spec)


def cached_adapters(llm, requests, specs):
    """Prompts are cached for each pair of adapter and steering, and for no other."""
    one, other = specs["first layer"], specs["kind/layer_norm"]
    seen = []
    for spec, number in [(None, 0), (one, 0), (one, 1), (None, 1), (one, 2), (other, 1), (one, 1), (None, 1), (one, 2)]:
        request, oracle = requests[number]
        hits = BLOCK if (spec, number) in seen else 0
        seen.append((spec, number))
        asked = engines.params(spec, max_tokens=8, detokenize=False)
        (output,) = llm.generate(
            {"prompt_token_ids": prompt(99, BLOCK + 20)}, asked, lora_request=request, use_tqdm=False
        )
        assert output.num_cached_tokens == hits
        assert engines.assert_matches_oracle(oracle, output, spec) < TOLERANCE
        if spec is not None:
            engines.assert_receipt(oracle, output, spec, cached=hits)


def lose_site(worker, site):
    """Runs in every worker: the op at `site` does nothing any more."""
    steering = worker.model_runner.armed.steering
    if site in steering.config.sites:
        steering.sites[steering.config.sites.index(site)].apply = lambda hidden, residual: None


def find_site(worker, site):
    """Runs in every worker: undo `lose_site`."""
    steering = worker.model_runner.armed.steering
    if site in steering.config.sites:
        del steering.sites[steering.config.sites.index(site)].apply


def graphs_are_chosen_by_whom_it_steers(worker):
    """Runs in every worker; tests/vllm_compat/test_cuda_graphs.py has what is chosen, on a GPU."""
    return worker.model_runner.cudagraph_dispatcher.armed is worker.model_runner.armed is not None


def test_pipeline_parallel(random_model, random_saes, random_oracle, random_specs, two_workers):
    """Compiled: on the CPU vLLM's own stages fail in eager mode."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    llm = start(random_model, random_saes, pipeline_parallel_size=2)
    try:
        first, last = ([check["site"] for check in checks] for checks in llm.collective_rpc("steering_self_test"))
        assert {site.split(".")[1] for site in first} == {"0", "1"}
        assert llm.collective_rpc(graphs_are_chosen_by_whom_it_steers) == [True, True]
        assert {site.split(".")[1] for site in last} == {"2", "3"}
        compare_all(llm, random_oracle, {name: spec for name, spec in random_specs.items() if "when" not in spec})
        with pytest.raises(
            ValueError, match=r"when\[0\]: conditions are not supported on a server with pipeline stages"
        ):
            engines.generate(llm, [prompt(1)], [engines.params(random_specs["where a feature is on"])])
        spec = random_specs["every layer"]
        for layer in range(LAYERS):
            site = f"blocks.{layer}.hook_resid_post"
            llm.collective_rpc(lose_site, args=(site,))
            with pytest.raises(Exception, match=f"steering was not applied at {site}; the answer is withheld"):
                engines.generate(llm, [prompt(2)], [engines.params(spec, max_tokens=8, detokenize=False)])
            llm.collective_rpc(find_site, args=(site,))
        compare_all(llm, random_oracle, {"every layer": spec})
    finally:
        engines.stop(llm)
