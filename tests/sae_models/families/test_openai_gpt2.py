"""OpenAI's SAEs of GPT-2 small."""

import shutil

import pytest

from sae_models import HookPoint, Selection
from tests.sae_models.conformance import assert_conforms, cases
from tests.sae_models.pickles import (
    assert_a_server_refuses,
    assert_every_damage_is_named,
    damaged,
    load_pickled,
    refusal,
)

CASES = {parameter.id: parameter.values[0] for parameter in cases("openai_gpt2")}
TENSORS = ("encoder.weight", "decoder.weight", "latent_bias", "pre_bias")
PLACES = {
    "v1_resid_delta_mlp": "mlp_out",
    "v4_mlp_post_act": "mlp_post",
    "v5_resid_delta_attn": "attn_out",
    "v5_resid_post_attn": "resid_mid",
    "v5_resid_post_mlp": "resid_post",
}


@pytest.mark.parametrize("name", CASES)
def test_it_does_what_openais_code_says(name):
    expected = CASES[name]
    sae = load_pickled(expected.checkpoint)
    assert_conforms(sae, expected)
    assert sae.hook_points == sae.hook_points_out == (HookPoint(6, PLACES[name]),)
    assert (sae.model_name, sae.name) == ("gpt2", f"{expected.checkpoint.parent.parent.name}/6")
    if name.startswith("v5"):
        assert (sae.architecture, sae.selection, sae.token_norm) == ("topk", Selection(3), "layer_norm")
    else:
        assert (sae.architecture, sae.selection, sae.token_norm) == ("relu", None, "none")


def test_places_that_no_engine_arms_are_still_named():
    armable = {name: load_pickled(CASES[name].checkpoint).hook_point.armable for name in CASES}
    assert [name for name, is_armable in armable.items() if not is_armable] == ["v4_mlp_post_act", "v5_resid_post_attn"]
    assert str(load_pickled(CASES["v4_mlp_post_act"].checkpoint).hook_point) == "blocks.6.mlp.hook_post"


def test_equal_files_at_two_places_are_two_saes(tmp_path):
    published = CASES["v5_resid_post_mlp"].checkpoint
    other = tmp_path / "resid_delta_mlp_v5_128k" / "autoencoders" / "7.pt"
    other.parent.mkdir(parents=True)
    shutil.copy(published, other)
    sae = load_pickled(other)
    assert sae.hook_point == HookPoint(7, "mlp_out")
    assert load_pickled(other.parent).hook_point == HookPoint(7, "mlp_out")
    assert sae.sha256 != load_pickled(published).sha256


def test_a_file_elsewhere_is_known_by_its_tensors(tmp_path):
    copy = tmp_path / "6.pt"
    shutil.copy(CASES["v5_resid_post_mlp"].checkpoint, copy)
    assert "do not say where it reads; add ?hook=" in refusal(copy)
    sae = load_pickled(f"{copy}?hook=blocks.6.hook_resid_post&k=2&model=org/gpt2")
    assert (sae.hook_point, sae.selection, sae.model_name) == (HookPoint(6), Selection(2), "org/gpt2")


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    folder = tmp_path / "resid_post_mlp_v5_32k" / "autoencoders"
    published = CASES["v5_resid_post_mlp"].checkpoint
    assert_every_damage_is_named(
        CASES["v1_resid_delta_mlp"].checkpoint, TENSORS, tmp_path, "resid_delta_mlp/autoencoders"
    )
    folder.mkdir(parents=True)
    for damage, says in (
        (lambda s: s["activation_state_dict"].update(postact_fn="Identity"), "postact_fn='Identity' is not supported"),
        (lambda s: s["activation_state_dict"].pop("k"), "k must be a positive integer, got None"),
        (lambda s: s["activation_state_dict"].update(k=49), "k=49 is larger than d_sae=48"),
        (lambda s: s.update(activation="Sigmoid"), "activation='Sigmoid' with postact_fn='ReLU' is not supported"),
        (lambda s: s.update(activation=b"TopK"), "activation is a bytes, not a tensor"),
    ):
        assert says in refusal(damaged(published, folder, damage))
    assert "k=49 is larger than d_sae=48" in refusal(f"{published}?k=49")
    assert "option k=3 has no use" in refusal(f"{CASES['v1_resid_delta_mlp'].checkpoint}?k=3")


@pytest.mark.parametrize("name", CASES)
def test_a_server_refuses_it(name):
    assert_a_server_refuses(CASES[name].checkpoint)
