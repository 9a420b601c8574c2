"""A model of Mamba-2 and attention on the V2 model runner, in a ModelState for both. `test_runner_v2.py` runs this."""

import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from tests.e2e import engines
from tests.e2e.random_cases import D_MODEL, LAYERS, VOCAB, compare_all, start, vector
from tests.oracle.hf_oracle import Oracle

HYBRID = GraniteMoeHybridConfig(
    hidden_size=D_MODEL,
    intermediate_size=256,
    shared_intermediate_size=256,
    num_hidden_layers=LAYERS,
    layer_types=["mamba", "attention", "mamba", "attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=256,
    num_local_experts=0,
    num_experts_per_tok=0,
    mamba_n_heads=8,
    mamba_d_head=32,
    mamba_d_state=16,
    mamba_n_groups=1,
    mamba_chunk_size=64,
    initializer_range=0.1,
    position_embedding_type="nope",
    attention_multiplier=0.2,
    dtype="float32",
)
SPECS = {
    "first layer": {"vectors": [{"data": vector(1, 6.0), "layers": [0]}]},
    "every layer": {"vectors": [{"data": vector(3, 4.0, LAYERS), "layers": list(range(LAYERS))}]},
    "generation": {"vectors": [{"data": vector(5, 8.0), "layers": [0, 2]}], "apply": {"phase": "generation"}},
}


def test_layers_of_either_kind(tmp_path):
    torch.manual_seed(0)
    GraniteMoeHybridForCausalLM(HYBRID).save_pretrained(tmp_path / "hybrid")
    llm = start(tmp_path / "hybrid", {}, enforce_eager=True)
    try:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        (checks,) = llm.collective_rpc("steering_self_test")
        assert [check["passed"] for check in checks] == [True] * LAYERS
        compare_all(llm, Oracle(tmp_path / "hybrid", {}), SPECS, tokens=8)
    finally:
        engines.stop(llm)
