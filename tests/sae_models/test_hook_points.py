"""Names of places in a model, in every spelling."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_models.hook_points import ARMABLE, HookPoint, Kind

SPELLINGS = {
    HookPoint(7, "resid_post"): (
        "blocks.7.hook_resid_post", "blocks.8.hook_resid_pre", "resid_post_layer_7", "model.layers.7",
        "model.layers.7.output", "model.layers.8.input", "layers.7", "transformer.h.7", "h.7", "gpt_neox.layers.7",
        "language_model.model.layers.7.output", "blocks.7",
    ),
    HookPoint(0, "resid_pre"): ("blocks.0.hook_resid_pre", "model.layers.0.input"),
    HookPoint(7, "resid_mid"): ("blocks.7.hook_resid_mid", "blocks.7.hook_mlp_in"),
    HookPoint(7, "attn_out"): (
        "blocks.7.hook_attn_out", "model.layers.7.self_attn", "model.layers.7.self_attn.output", "transformer.h.7.attn",
        "gpt_neox.layers.7.attention", "layers.7.attention.output", "attn_out_layer_7", "attention_out_layer_7",
    ),
    HookPoint(7, "mlp_in"): (
        "blocks.7.mlp.hook_in", "model.layers.7.mlp.input", "layers.7.mlp.input",
        "model.layers.7.pre_feedforward_layernorm.output",
    ),
    HookPoint(7, "mlp_out"): (
        "blocks.7.hook_mlp_out", "blocks.7.mlp.hook_out", "model.layers.7.mlp", "model.layers.7.mlp.output",
        "layers.7.mlp", "transformer.h.7.mlp", "model.layers.7.post_feedforward_layernorm.output", "mlp_out_layer_7",
    ),
    HookPoint(7, "hook_z"): (
        "blocks.7.attn.hook_z", "model.layers.7.self_attn.o_proj.input", "transformer.h.7.attn.c_proj.input",
        "gpt_neox.layers.7.attention.dense.input",
    ),
    HookPoint(7, "ln2_normalized"): ("blocks.7.ln2.hook_normalized",),
    HookPoint(0, "embed"): (
        "hook_embed", "embed_tokens", "model.embed_tokens", "transformer.wte", "gpt_neox.embed_in",
        "model.language_model.embed_tokens",
    ),
}  # fmt: skip
KINDS = get_args(Kind)


@pytest.mark.parametrize(
    ("point", "name"), [(point, name) for point, names in SPELLINGS.items() for name in names], ids=lambda v: str(v)
)
def test_spellings(point, name):
    assert HookPoint.parse(name) == point


@given(st.sampled_from(KINDS), st.integers(0, 10_000))
def test_what_is_printed_is_read_again(kind, layer):
    layer = 0 if kind in ("embed", "resid_pre") else layer
    assert HookPoint.parse(str(HookPoint(layer, kind))) == HookPoint(layer, kind)


@given(st.integers(1, 10_000))
def test_before_a_layer_is_after_the_one_below(layer):
    for name in (f"blocks.{layer}.hook_resid_pre", f"model.layers.{layer}.input"):
        assert HookPoint.parse(name) == HookPoint(layer - 1, "resid_post")


@pytest.mark.parametrize(
    "name",
    [
        "", "blocks", "blocks.x.hook_resid_post", "blocks.-1.hook_resid_post", "blocks.7.hook_resid_post.extra",
        " blocks.7.hook_resid_post", "blocks.7.hook_resid_post\n", "xblocks.7.hook_resid_post", "blocks.7.hook_z",
        "model.layers.7.post_attention_layernorm", "model.layers.7.post_attention_layernorm.output",
        "model.layers.7.input_layernorm.output", ".post_feedforward_layernorm.output",
        ".pre_feedforward_layernorm.output", "model.layers.mlp", "resid_post_layer_", "blocks.1.2.hook_resid_post", "7",
        "model.norm", "lm_head",
    ],
)  # fmt: skip
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match=r"hook point .* is not known; known: blocks\.<layer>\.hook_resid_pre"):
        HookPoint.parse(name)


@given(st.one_of(st.text(), st.from_regex(r"[a-z_.]{0,12}\.[0-9]{1,3}[a-z_.]{0,20}", fullmatch=True)))
def test_anything_else_is_a_place_or_an_error(name):
    try:
        point = HookPoint.parse(name)
    except ValueError:
        return
    assert HookPoint.parse(str(point)) == point


def test_what_an_engine_can_arm():
    assert {kind for kind in KINDS if HookPoint(0, kind).armable} == set(ARMABLE) < set(KINDS)
    assert {"hook_z", "ln2_normalized", "embed", "resid_mid"}.isdisjoint(ARMABLE)
