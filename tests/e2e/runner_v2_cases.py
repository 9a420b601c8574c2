"""A real engine on the V2 model runner against the oracle, its decode steps replayed from (emulated) CUDA graphs.
`test_runner_v2.py` runs this."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.e2e import engines
from tests.e2e.tiny_models import LLAMA
from tests.oracle.hf_oracle import Oracle
from tests.sae_models.build import build_sae
from tests.tensors import inline

BLOCK, CHUNK = 128, 48


def direction(seed):
    return torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(seed)), dim=0)


def vector(seed, layers, **entry):
    return {"data": inline(direction(seed) * 3), "layers": layers} | (entry or {"strength": 1.0})


SPECS = {
    "add": {"vectors": [vector(1, [0, 1])]},
    "unsteered": None,
    "feature": {"features": [{"sae": "jumprelu", "index": 5, "op": "set", "value": 6.0}]},
    "project out": {"vectors": [vector(4, [1], op="project_out")], "apply": {"skip_first": 3}},
    "topk feature": {"features": [{"sae": "topk", "index": 7, "op": "add", "value": 5.0}]},
    # Late, as vLLM preempts who came last.
    "generation only": {"vectors": [vector(2, [1, 2])], "apply": {"phase": "generation"}},
    "prompt only": {"vectors": [vector(3, [0])], "apply": {"phase": "prompt"}},
    "where a feature is on": {
        "vectors": [vector(5, [1, 2])],
        "when": [{"feature": {"sae": "topk", "index": 48}, "op": ">", "value": 0.2}],
    },
}


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """Weights large enough for every layer to matter to the next token."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    settings = LLAMA | {"max_position_embeddings": 512, "initializer_range": 0.1}
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_saes(tmp_path_factory):
    root = tmp_path_factory.mktemp("saes")
    return {kind: str(build_sae(root / kind, kind, d_in=128, d_sae=64, seed=2)) for kind in ("jumprelu", "topk")}


@pytest.fixture(scope="module")
def tiny_oracle(tiny_llama, tiny_saes):
    return Oracle(tiny_llama, tiny_saes)


@pytest.fixture(scope="module")
def v2(tiny_llama, tiny_saes):
    """Compiled; prompts in chunks of at most 48 tokens, room for about five sequences of three blocks."""
    llm = engines.start(
        tiny_llama,
        tiny_saes,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        num_gpu_blocks_override=16,
        steering={"pretrained": False},
    )
    yield llm
    engines.stop(llm)


def prompt(seed, tokens):
    return torch.randint(1, 512, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def check(oracle, output, spec, cached=None):
    engines.assert_matches_oracle(oracle, output, spec)
    if spec is None:
        assert not hasattr(output, "steering")
    else:
        engines.assert_receipt(oracle, output, spec, cached=cached)


def test_this_is_what_runs_on_gpus(v2):
    assert v2.llm_engine.vllm_config.use_v2_model_runner
    assert v2.llm_engine.vllm_config.scheduler_config.async_scheduling
    (checks,) = v2.collective_rpc("steering_self_test")
    assert [check["passed"] for check in checks] == [True] * 3
    assert all(check["compiled_error"] < 1e-3 for check in checks)


def test_every_spec_moves_the_model(tiny_oracle):
    """Otherwise agreement with the oracle would prove nothing."""
    for i, (name, spec) in enumerate(SPECS.items()):
        if spec is not None:
            tokens = prompt(i, 40)
            steered, plain = (tiny_oracle.logprobs(tokens, 30, s) for s in (spec, None))
            likely = steered.topk(3, dim=-1).indices
            assert (steered - plain).gather(-1, likely).abs().max() > 10 * engines.LOGPROB_TOLERANCE, name


def test_decode_steps_are_replayed_whole(v2):
    """From the graphs with the launches of every site where a request is steered, from vLLM's own where none is."""
    mixed = ["unsteered", "add", "prompt only"]
    for names in (["unsteered"], ["add"], mixed):
        before = engines.replays(v2)
        params = [engines.params(SPECS[name], max_tokens=5, detokenize=False) for name in names]
        engines.generate(v2, [prompt(40 + i, 8 + i) for i in range(len(names))], params)
        vanilla, steered = (n - m for n, m in zip(engines.replays(v2), before, strict=True))
        # The first of several may be scheduled before the others have come.
        assert steered >= 4 if names == mixed else (vanilla, steered) == ((0, 4) if names == ["add"] else (4, 0))


def test_chunked_prompts_mixed_batches_and_preemption(v2, tiny_oracle):
    """Prompts of two blocks that outgrow them, in chunks; then preemption, and prompts that are added again."""
    prompts = [prompt(i, 235 + 2 * i) for i in range(len(SPECS))]
    params = [engines.params(spec, max_tokens=40, detokenize=False) for spec in SPECS.values()]
    outputs = engines.generate(v2, prompts, params)
    for spec, output in zip(SPECS.values(), outputs, strict=True):
        check(tiny_oracle, output, spec)
    preempted = next(m.value for m in v2.get_metrics() if m.name == "vllm:num_preemptions")
    assert preempted > 0, "nothing was preempted: the test has lost its pressure"


def test_prefix_cache(v2, tiny_oracle):
    """Unsteered and steered traffic never share blocks, identical steerings do."""
    tokens = prompt(20, BLOCK + 20)
    for spec, hits in ((None, 0), (SPECS["add"], 0), (SPECS["add"], BLOCK), (SPECS["generation only"], BLOCK)):
        (output,) = engines.generate(v2, [tokens], [engines.params(spec, max_tokens=4, detokenize=False)])
        assert output.num_cached_tokens == hits
        check(tiny_oracle, output, spec, cached=hits)


def test_several_choices(v2, tiny_oracle):
    spec = SPECS["generation only"]
    sampling = engines.params(spec, n=2, temperature=0.8, seed=7, max_tokens=12, detokenize=False)
    (output,) = engines.generate(v2, [prompt(22, 60)], [sampling])
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 2
    for choice in range(2):
        engines.assert_matches_oracle(tiny_oracle, output, spec, greedy=False, choice=choice)
    assert output.steering["applied"][0]["tokens"] == 2 * 11


def test_the_triton_kernel_edits_each_token_once(v2):
    def edited():
        """Tokens at each of the three layers, as the kernel counted them."""
        return torch.tensor(v2.collective_rpc(lambda w: w.model_runner.armed.steering.table.edited.tolist())[0])

    before = edited()
    engines.generate(v2, [prompt(24, 60)], [engines.params(SPECS["add"], max_tokens=5, detokenize=False)])
    assert (edited() - before).tolist() == [60 + 4, 60 + 4, 0]


def test_finished_requests_are_forgotten(v2):
    """A worker of unsteered requests arms nothing."""
    for spec in (SPECS["add"], None):
        # The scheduler says with the next step what has finished.
        engines.generate(v2, [prompt(25, 60)], [engines.params(spec, max_tokens=2, detokenize=False)])
    assert v2.collective_rpc(lambda worker: worker.model_runner.armed.steering.has_work) == [False]


def test_what_chooses_cuda_graphs_asks_whether_anyone_is_steered(v2):
    """tests/vllm_compat/test_cuda_graphs.py has what it then chooses, on a GPU."""
    (known,) = v2.collective_rpc(
        lambda worker: worker.model_runner.cudagraph_manager.armed is worker.model_runner.armed is not None
    )
    assert known


def test_only_batches_of_requests_reach_the_sites(v2):
    """A dummy batch, as data-parallel ranks run them and as warm-up and profiling do."""
    v2.collective_rpc("steering_capture", args=(["blocks.1.hook_resid_post"],))
    v2.collective_rpc("execute_dummy_batch")
    ((dummy,),) = v2.collective_rpc("steering_take_captured")
    engines.generate(v2, [prompt(30, 60)], [engines.params(SPECS["add"], max_tokens=5, detokenize=False)])
    ((real,),) = v2.collective_rpc("steering_take_captured")
    v2.collective_rpc("steering_capture", args=([],))
    assert len(dummy) == 0
    assert len(real) == (60 + 4) * 128 * 4
