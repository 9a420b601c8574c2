"""Features of other models than the embedded one: where an SAE reads them, and what cannot be read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sae_models import load
from steer_server.sae.explain import ExplainError, explain
from tests.sae.texts import SOURCES, TEXTS
from tests.sae_models.build import build_sae


def tiny_model(folder, model_dir, model, prefix=False) -> Path:
    """A random model of two layers with the embedded model's tokenizer, which may put a token before every text."""
    torch.manual_seed(0)
    network = model()
    for name, parameter in network.named_parameters():
        if "norm" in name or "ln_f" in name:
            parameter.data.uniform_(0.5, 1.5)
    network.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if prefix:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(folder)
    return folder


SIZE = {"vocab_size": 49152, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=32, num_key_value_heads=1)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZE, intermediate_size=32, num_key_value_heads=1, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, intermediate_size=32, num_key_value_heads=1, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=49152, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
}


@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("gemma", 1), ("gpt2", 0)])
def test_other_families_are_read_at_the_same_place(family, layer, model_dir, tmp_path, tokenizer):
    folder = tiny_model(tmp_path / "model", model_dir, TINY[family])
    sae = load(build_sae(tmp_path / "sae", d_in=16, d_sae=12, layer=layer))
    network = TINY[family]().from_pretrained(folder)
    evidence, features = explain(sae, folder, TEXTS[1:2], SOURCES, spans=1)
    features = list(features)
    ids = tokenizer(TEXTS[1]).input_ids
    seen = []
    stack = network.transformer.h if family == "gpt2" else network.model.layers
    stack[layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(torch.tensor([ids]))
    x = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    W_enc, b_enc = sae.encoder()
    acts = (x[0] @ W_enc + b_enc).relu()
    assert evidence.tokens == len(ids)
    assert [feature.max_activation for feature in features] == pytest.approx(acts.amax(0).tolist(), abs=1e-4)

    norm = network.transformer.ln_f if family == "gpt2" else network.model.norm
    gain = norm.weight.detach().double() + (family == "gemma")
    texts = [tokenizer.decode([i]) for i in range(49152)]
    ordinary = [i for i, text in enumerate(texts) if i >= 17 and "\ufffd" not in text]
    for feature in features:
        row = sae.rows(feature.index).decoder.double()
        if family == "gpt2":
            row = row - row.mean()
        logits = (row * gain) @ network.lm_head.weight.detach().double()[ordinary].T
        logits -= logits.mean()
        for most, scores in ((logits.topk(10), feature.raised), (logits.topk(10, largest=False), feature.lowered)):
            assert [score.score for score in scores] == pytest.approx(most.values.tolist(), rel=1e-3)
            assert {score.token for score in scores[:9]} <= {texts[ordinary[i]] for i in most.indices.tolist()}


PLACES = {
    "blocks.0.hook_resid_pre": lambda network: network.model.embed_tokens,
    "blocks.1.hook_attn_out": lambda network: network.model.layers[1].self_attn.o_proj,
    "blocks.1.hook_mlp_out": lambda network: network.model.layers[1].mlp.down_proj,
    "blocks.1.mlp.hook_in": lambda network: network.model.layers[1].post_attention_layernorm,
}
NORMED_PLACES = {
    "blocks.1.hook_attn_out": lambda network: network.model.layers[1].post_attention_layernorm,
    "blocks.1.hook_mlp_out": lambda network: network.model.layers[1].post_feedforward_layernorm,
    "blocks.1.mlp.hook_in": lambda network: network.model.layers[1].pre_feedforward_layernorm,
}


@pytest.mark.parametrize(
    ("family", "hook_name", "place"),
    [("llama", *place) for place in PLACES.items()] + [("gemma2", *place) for place in NORMED_PLACES.items()],
)
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_an_sae_is_read_where_it_reads(family, hook_name, place, norm, model_dir, tmp_path, tokenizer):
    folder = tiny_model(tmp_path / "model", model_dir, TINY[family])
    config = {"metadata": {"model_name": "m", "hook_name": hook_name}, "normalize_activations": norm}
    sae = load(build_sae(tmp_path / "sae", d_in=16, d_sae=12, cfg=config))
    network = TINY[family]().from_pretrained(folder)
    evidence, features = explain(sae, folder, TEXTS[1:2], SOURCES, spans=0)
    features = list(features)
    seen = []
    place(network).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(torch.tensor([tokenizer(TEXTS[1]).input_ids]))
    acts = sae.encode(seen[0][0].double())
    kept = seen[0][0].norm(dim=-1) <= 10 * seen[0][0].norm(dim=-1).median()
    assert evidence.tokens == int(kept.sum())
    wanted = acts[kept].amax(0).tolist()
    assert [feature.max_activation for feature in features] == pytest.approx(wanted, abs=1e-4)
    assert max(wanted) > 0.1


def test_a_place_that_cannot_be_read_is_named(model_dir, tmp_path):
    folder = tiny_model(tmp_path / "model", model_dir, TINY["llama"])
    hook = {"metadata": {"model_name": "m", "hook_name": "blocks.1.ln2.hook_normalized"}}
    sae = load(build_sae(tmp_path / "sae", d_in=16, d_sae=12, cfg=hook))
    with pytest.raises(ExplainError, match=r"blocks.1.ln2.hook_normalized is not a place"):
        explain(sae, folder, TEXTS[1:2], SOURCES)


def test_a_prefix_of_the_tokenizer_is_no_text(model_dir, tmp_path, tokenizer):
    folder = tiny_model(tmp_path / "model", model_dir, TINY["llama"], prefix=True)
    sae = load(build_sae(tmp_path / "sae", d_in=16, d_sae=12, layer=0))
    evidence, features = explain(sae, folder, TEXTS[:1], SOURCES, context_length=9, contexts=3)
    ids = tokenizer(TEXTS[0]).input_ids
    assert evidence.tokens == len(ids)
    network = TINY["llama"]().from_pretrained(folder)
    W_enc, b_enc = sae.encoder()
    with torch.no_grad():
        pieces = [[tokenizer.bos_token_id, *ids[i : i + 8]] for i in range(0, len(ids), 8)]
        hidden = [network(torch.tensor([p]), output_hidden_states=True).hidden_states[1][0, 1:] for p in pieces]
    acts = (torch.cat(hidden) @ W_enc + b_enc).relu()
    features = list(features)
    assert [feature.max_activation for feature in features] == pytest.approx(acts.amax(0).tolist(), abs=1e-4)
    assert all(len(context.tokens) <= 8 for feature in features for context in feature.contexts)
    assert all("".join(c.tokens) in TEXTS[0] for feature in features for c in feature.contexts)


def test_a_span_that_is_a_sink_by_itself_is_none(model_dir, tmp_path):
    """All second tokens are made sinks; a span of one token runs as the second of its sequence."""
    folder = tiny_model(tmp_path / "model", model_dir, TINY["gpt2"])
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"][1] *= 1000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    sae = load(build_sae(tmp_path / "sae", d_in=16, d_sae=12, layer=0))
    _, features = explain(sae, folder, TEXTS[1:2], SOURCES, spans=10)
    spans = [c.span[1] - c.span[0] for feature in features for c in feature.contexts if c.span is not None]
    assert spans
    assert min(spans) > 1


def test_no_more_tokens_are_read_than_asked_for(model_dir, tmp_path):
    folder = tiny_model(tmp_path / "model", model_dir, TINY["llama"])
    sae = load(build_sae(tmp_path / "sae", d_in=16, d_sae=12, layer=0))
    stages = []
    runs = [
        explain(
            sae, folder, TEXTS, SOURCES, tokens=100, context_length=16, progress=lambda *stage: stages.append(stage)
        )
        for _ in range(2)
    ]
    (evidence, features), (again, features_again) = runs
    assert 84 <= evidence.tokens <= 100
    assert (evidence, list(features)) == (again, list(features_again))
    assert ("reading", evidence.tokens, evidence.tokens) in stages
    assert stages[-1] == ("describing", 12, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": 8}, "is for d_model=8, the model has 16"),
        ({"layer": 2}, "is for layer 2, the model has 2 layers"),
    ],
)
def test_an_sae_of_another_model_is_an_error(changes, message, model_dir, tmp_path):
    folder = tiny_model(tmp_path / "model", model_dir, TINY["llama"])
    sae = load(build_sae(tmp_path / "sae", **{"d_in": 16, "layer": 0} | changes))
    with pytest.raises(ExplainError, match=message):
        explain(sae, folder, TEXTS, SOURCES)


@pytest.mark.parametrize("left", [(), ("config.json",), ("config.json", "model.safetensors")])
def test_a_folder_that_is_no_model_is_an_error(left, model_dir, tmp_path):
    folder = tiny_model(tmp_path / "model", model_dir, TINY["llama"])
    for path in folder.iterdir():
        if path.name not in left:
            path.unlink()
    sae = load(build_sae(tmp_path / "sae", d_in=16, layer=0))
    with pytest.raises(ExplainError, match="not a model that transformers can load"):
        explain(sae, folder, TEXTS, SOURCES)
