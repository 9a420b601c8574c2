"""Gemma Scope 2's safetensors against their equations, with their configurations and without."""

import pytest
import torch
from safetensors.torch import load_file

from sae_models import HookPoint, SAEFormatError, load
from sae_models.saelens_writer import save_saelens
from tests.sae_models.families.changes import copied, rewrite
from tests.sae_models.families.expected import FIXTURES, assert_close, assert_same_answers, expected

FAMILY = FIXTURES / "gemma_scope_2"
READS, WRITES = HookPoint(3, "mlp_in"), HookPoint(3, "mlp_out")
SAES = {
    "resid_post": (HookPoint(3), "google/gemma-3-1b-pt"),
    "resid_post_all": (HookPoint(3), "google/gemma-3-270m"),
    "mlp_out": (WRITES, "google/gemma-3-4b-it"),
    "attn_out": (HookPoint(3, "hook_z"), "google/gemma-3-4b-it"),
}
TRANSCODERS = {
    "transcoder": ("jumprelu_transcoder", "google/gemma-3-12b-pt"),
    "transcoder_all": ("jumprelu_transcoder", "google/gemma-3-27b-it"),
    "affine": ("jumprelu_skip_transcoder", "google/gemma-3-1b-it"),
    "affine_with_config": ("jumprelu_skip_transcoder", "google/gemma-3-1b-it"),
    "clt": ("jumprelu_clt_own_layer", "google/gemma-3-270m"),
    "clt_affine": ("jumprelu_skip_clt_own_layer", "google/gemma-3-270m"),
}


def case(name):
    answers = expected(FAMILY / name / "expected.safetensors")
    return FAMILY / name / answers.notes["checkpoint"], answers


@pytest.mark.parametrize("name", SAES)
def test_saes(name):
    folder, answers = case(name)
    for location in (folder, folder / "params.safetensors"):
        sae = load(location)
        assert_same_answers(sae, answers)
        assert (sae.d_in, sae.d_out, sae.d_sae, sae.selection) == (16, 16, 48, None)
        assert (sae.family, sae.architecture, sae.token_norm) == ("Gemma Scope 2", "jumprelu", "none")
        assert (sae.hook_points, sae.model_name) == ((SAES[name][0],), SAES[name][1])
        assert not sae.is_transcoder


@pytest.mark.parametrize("name", TRANSCODERS)
def test_transcoders(name):
    path, answers = case(name)
    sae = load(path)
    assert_same_answers(sae, answers)
    assert (sae.architecture, sae.model_name) == TRANSCODERS[name]
    assert (sae.hook_points, sae.hook_points_out) == ((READS,), (WRITES,))
    assert (sae.weights.W_skip is not None) == ("skip" in sae.architecture)


@pytest.mark.parametrize("name", [*SAES, *TRANSCODERS])
def test_written_as_saelens_and_read_again(name, tmp_path):
    path, answers = case(name)
    sae = load(path)
    save_saelens(sae, tmp_path / "out")
    again = load(tmp_path / "out")
    assert_same_answers(again, answers)
    assert (again.hook_points, again.hook_points_out) == (sae.hook_points, sae.hook_points_out)


@pytest.mark.parametrize("name", [*SAES, *TRANSCODERS])
def test_saelens_agrees_but_for_cross_layer_transcoders(name):
    """A layer of a cross-layer transcoder writes to each later layer along a decoder of that layer.

    SAELens 6.54 adds these decoders up and has the sum written to its own layer, which none of them is for.
    """
    path, answers = case(name)
    theirs, right = answers.tensors["saelens_reconstruction"], answers.tensors["reconstruction"]
    assert_close(answers.tensors["saelens_activations"], answers.activations)
    if not name.startswith("clt"):
        assert_close(theirs, right)
        return
    assert float((theirs - right).abs().max()) > 10
    decoders = load_file(path)["w_dec"].double()
    assert_close(right.double() + answers.activations.double() @ (decoders.sum(1) - decoders[:, 3]), theirs)


@pytest.mark.parametrize("name", ["transcoder", "affine", "clt"])
def test_transcoders_read_what_the_mlp_reads(name):
    """SAELens 6.54 calls the place `hook_mlp_in`, which in TransformerLens is the stream before the MLP's norm."""
    path, answers = case(name)
    assert HookPoint.parse(answers.notes["saelens_hook_name"]) == HookPoint(3, "resid_mid")
    assert load(path).hook_point == READS


@pytest.mark.parametrize("name", ["resid_post", "mlp_out", "transcoder", "affine_with_config"])
def test_path_and_configuration_say_the_same(name, tmp_path):
    folder, answers = case(name)
    site, named = folder.parts[-2:]
    alone = copied(folder, tmp_path / folder.parts[-3] / site / named)
    (alone / "config.json").unlink()
    sae, with_config = load(alone), load(folder)
    assert_same_answers(sae, answers)
    assert (sae.architecture, sae.model_name) == (with_config.architecture, with_config.model_name)
    assert (sae.hook_points, sae.hook_points_out) == (with_config.hook_points, with_config.hook_points_out)


def test_the_layout_of_a_hugging_face_cache(tmp_path):
    path, answers = case("clt")
    folder = tmp_path / "models--google--gemma-scope-2-270m-pt/snapshots/fd57/clt/width_262k_l0_medium"
    copied(path.parent, folder)
    sae = load(folder / path.name)
    assert_same_answers(sae, answers)
    assert (sae.model_name, sae.hook_points_out) == ("google/gemma-3-270m", (WRITES,))


def test_what_neither_path_nor_configuration_says(tmp_path):
    folder, answers = case("resid_post")
    alone = copied(folder, tmp_path / "mine", "config.json", config={"hf_hook_point_in": None, "model_name": None})
    with pytest.raises(SAEFormatError, match=r"do not say where it reads; add \?hook="):
        load(alone)
    sae = load(f"{alone}?hook=model.layers.3.output")
    assert_same_answers(sae, answers)
    assert sae.model_name is None
    with pytest.raises(SAEFormatError, match=r"do not say where it writes; add \?hook_out="):
        load(f"{alone}?hook=model.layers.3.pre_feedforward_layernorm.output")


def test_crosscoders_are_refused(tmp_path):
    folder, _ = case("resid_post")
    named = copied(folder, tmp_path / "crosscoder" / "layer_7_13_17_22_width_262k_l0_medium")
    said = copied(folder, tmp_path / "said", "config.json", config={"type": "crosscoder"})
    for path in (named, said):
        with pytest.raises(SAEFormatError, match="crosscoders are not supported: its features are read from several"):
            load(path)


@pytest.mark.parametrize(
    ("name", "tensors", "config", "says"),
    [
        ("resid_post", {"threshold": None}, None, "tensor threshold is missing"),
        ("resid_post", {"b_dec": None}, None, "tensor b_dec is missing"),
        ("resid_post", {"w_enc": torch.zeros(48, 16)}, None, r"expected \[16, 48\] \(it is transposed\)"),
        ("resid_post", {"w_dec": torch.zeros(16, 48)}, None, r"expected \[48, 16\] \(it is transposed\)"),
        ("resid_post", {"w_dec": torch.zeros(48, 16, dtype=torch.int8)}, None, "w_dec has dtype I8"),
        ("resid_post", {"threshold": torch.full((48,), float("nan"))}, None, "threshold holds values that are not fin"),
        ("resid_post", {"w_gate": torch.zeros(48)}, None, "not supported: w_gate"),
        ("resid_post", None, {"architecture": "relu"}, "architecture='relu' is not supported; supported: jump_relu"),
        ("resid_post", None, {"hf_hook_point_in": "model.layers.3.elsewhere"}, "'model.layers.3.elsewhere' is not kno"),
        ("affine_with_config", {"affine_skip_connection": None}, None, "affine_skip_connection is missing"),
        ("affine", {"affine_skip_connection": None}, None, "affine_skip_connection is missing"),
        ("affine", {"affine_skip_connection": torch.zeros(16, 15)}, None, r"expected \[16, 16\]"),
    ],
)
def test_broken_checkpoints(tmp_path, name, tensors, config, says):
    folder, _ = case(name)
    broken = copied(folder, tmp_path / "/".join(folder.parts[-3:]), "config.json", tensors, config)
    with pytest.raises(SAEFormatError, match=says):
        load(broken)


def test_broken_layers_of_cross_layer_transcoders(tmp_path):
    path, _ = case("clt")
    folder = copied(path.parent, tmp_path / "gemma-scope-2-270m-pt/clt/width_262k_l0_medium")
    with pytest.raises(SAEFormatError, match="writes to 6 layers, and the file's name says that it is layer 6"):
        load((folder / path.name).rename(folder / "params_layer_6.safetensors"))
    for changed, says in (
        (torch.zeros(48, 16), r"w_dec has shape \[48, 16\], expected \[d_sae, layers, d\]"),
        (torch.zeros(6, 48, 16), r"w_dec has shape \[6, 48, 16\], expected \[48, 48, 16\]"),
        (None, "tensor w_dec is missing"),
    ):
        rewrite(folder / "params_layer_6.safetensors", {"w_dec": changed})
        with pytest.raises(SAEFormatError, match=says):
            load(folder / "params_layer_6.safetensors")


def test_the_checksum_covers_the_configuration_and_the_place(tmp_path):
    folder, _ = case("resid_post")
    changed = copied(folder, tmp_path / "mine", "config.json", config={"hf_hook_point_in": "model.layers.4.output"})
    assert load(changed).sha256 != load(folder).sha256
