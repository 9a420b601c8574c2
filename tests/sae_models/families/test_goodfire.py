"""Goodfire: the Llama SAEs and the tied ones of DeepSeek-R1."""

import json
import shutil

import pytest

from sae_models import HookPoint, Selection
from tests.sae_models.conformance import assert_close, assert_conforms, cases
from tests.sae_models.pickles import (
    assert_a_server_refuses,
    assert_every_damage_is_named,
    damaged,
    load_pickled,
    refusal,
)

CASES = {parameter.id: parameter.values[0] for parameter in cases("goodfire")}
LINEAR = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")


@pytest.mark.parametrize("name", CASES)
def test_it_does_what_its_code_says(name):
    expected = CASES[name]
    sae = load_pickled(expected.checkpoint)
    assert_conforms(sae, expected)
    model, layer, architecture = {
        "llama_8b": ("meta-llama/Llama-3.1-8B-Instruct", 19, "relu"),
        "llama_70b": ("meta-llama/Llama-3.3-70B-Instruct", 50, "relu"),
        "r1_math": ("deepseek-ai/DeepSeek-R1", 37, "topk"),
    }[name]
    assert (sae.model_name, sae.architecture, sae.name) == (model, architecture, expected.checkpoint.stem)
    assert (sae.hook_points, sae.hook_points_out) == ((HookPoint(layer),), (HookPoint(layer),))
    assert sae.selection == (Selection(3) if name == "r1_math" else None)
    if name != "r1_math":
        assert_close(sae.encode(expected.x), expected.tensors["saelens_activations"])
        assert expected.metadata["saelens_hook_name"] == str(sae.hook_point)


def test_a_token_of_r1_does_not_depend_on_the_batch():
    """The release's `encode` takes the k n largest of n tokens together, so a token's features depend on the others.

    A server has no such batch: vLLM puts whoever is waiting into one. Ours is that function on each token by itself.
    """
    expected = CASES["r1_math"]
    alone, together = expected.tensors["activations"], expected.tensors["batch_activations"]
    assert int((alone != 0).sum(dim=1).max()) == 3
    assert int((together != 0).sum(dim=1).max()) > 3
    assert int((together != 0).sum(dim=1).min()) == 0
    assert_close(load_pickled(expected.checkpoint).encode(expected.x)[expected.clear], alone[expected.clear])


def test_r1_with_a_threshold_is_batchtopk():
    expected = CASES["r1_math"]
    sae = load_pickled(f"{expected.checkpoint}?threshold=0.5")
    assert (sae.architecture, sae.selection, sae.rows(0).threshold) == ("batchtopk", None, 0.5)
    pre = expected.x @ sae.encoder()[0] + sae.encoder()[1]
    assert_close(sae.encode(expected.x), pre * (pre > 0.5))


def test_r1_needs_k(tmp_path):
    copy = damaged(CASES["r1_math"].checkpoint, tmp_path, lambda state: None)
    assert "config.json, which is missing; add ?k=128 to the path (math) or ?k=64 (logic)" in refusal(copy)
    assert load_pickled(f"{copy}?k=3").selection == Selection(3)
    assert "k=49 is larger than d_sae=48" in refusal(f"{copy}?k=49")
    for config, says in (
        ({"d_in": 16, "expansion_factor": 3, "k": 0}, "k must be a positive integer, got 0"),
        ({"d_in": 16, "expansion_factor": 3}, "k must be a positive integer, got None"),
        ({"d_in": 16, "expansion_factor": 4, "k": 3}, "says d_in=16, expansion_factor=4; the tensors: d_in=16, d_sae"),
        ({"d_in": 7168, "expansion_factor": 4, "k": 3}, "says d_in=7168"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert says in refusal(copy)


def test_a_renamed_file_is_known_by_its_tensors(tmp_path):
    for name in ("llama_8b", "r1_math"):
        renamed = tmp_path / f"{name}.pt"
        shutil.copy(CASES[name].checkpoint, renamed)
        options = "&k=3" if name == "r1_math" else ""
        assert "do not say where it reads; add ?hook=" in refusal(f"{renamed}?{options.lstrip('&')}")
        sae = load_pickled(f"{renamed}?hook=model.layers.19{options}")
        assert (sae.family, sae.hook_point, sae.model_name) == ("Goodfire", HookPoint(19), None)


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    assert_every_damage_is_named(CASES["llama_8b"].checkpoint, LINEAR, tmp_path / "linear")
    tied = CASES["r1_math"].checkpoint
    for what, damage, says in (
        ("transposed", lambda s: s.update(W=s["W"].T.contiguous()), "W has shape [48, 16], expected [16, 48] (it is"),
        ("missing", lambda s: s.pop("b_dec"), "tensor b_dec is missing"),
        ("infinite", lambda s: s["W"].fill_(float("inf")), "W holds values that are not finite"),
    ):
        (tmp_path / what).mkdir()
        assert says in refusal(f"{damaged(tied, tmp_path / what, damage)}?k=3")
    assert "option k=3 has no use" in refusal(f"{CASES['llama_8b'].checkpoint}?k=3")


@pytest.mark.parametrize("name", CASES)
def test_a_server_refuses_it(name):
    assert_a_server_refuses(CASES[name].checkpoint)
