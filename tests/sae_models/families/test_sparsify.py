"""sparsify's checkpoints against what its own class, and SAELens' loader for them, answer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_models import SAEFormatError, load
from sae_models.families import sparsify
from sae_models.saelens_writer import save_saelens
from tests.sae_models.families.expected import FIXTURES, assert_close, assert_same_answers, expected

FAMILY = FIXTURES / "sparsify"
CASES = sorted(folder.name for folder in FAMILY.iterdir())


def case(name):
    answers = expected(FAMILY / name / "expected.safetensors")
    return FAMILY / name / answers.notes["checkpoint"], answers


@pytest.fixture
def copy(tmp_path):
    """`copy(case, tensors, config, hookpoint)`: a case with some of it changed; None takes a tensor or key out."""

    def change(name, tensors=None, config=None, hookpoint=None) -> Path:
        source, _ = case(name)
        folder = tmp_path / "run" / (hookpoint or source.name)
        shutil.copytree(source, folder)
        state = load_file(folder / "sae.safetensors") | (tensors or {})
        save_file({key: value for key, value in state.items() if value is not None}, folder / "sae.safetensors")
        merged = json.loads((folder / "cfg.json").read_text()) | (config or {})
        (folder / "cfg.json").write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
        return folder

    return change


@pytest.mark.parametrize("name", CASES)
def test_the_answers_of_the_library(name):
    folder, answers = case(name)
    sae = load(folder)
    assert_same_answers(sae, answers)
    assert (sae.d_in, sae.d_out, sae.d_sae) == (16, 16, 48)
    assert (sae.family, sae.token_norm, sae.model_name) == ("sparsify", "none", "EleutherAI/pythia-160m")
    assert sae.architecture in sparsify.ARCHITECTURES
    assert load(folder / "sae.safetensors").sha256 == sae.sha256


@pytest.mark.parametrize(
    ("name", "architecture", "reads", "writes"),
    [
        ("topk", "topk", "blocks.3.hook_resid_post", "blocks.3.hook_resid_post"),
        ("topk_skip", "topk_skip", "blocks.3.hook_resid_post", "blocks.3.hook_resid_post"),
        ("topk_mlp", "topk", "blocks.3.hook_mlp_out", "blocks.3.hook_mlp_out"),
        ("topk_embed_tokens", "topk", "hook_embed", "hook_embed"),
        ("groupmax", "groupmax", "blocks.3.hook_resid_post", "blocks.3.hook_resid_post"),
        ("transcode", "topk_transcoder", "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"),
        ("transcode_skip", "topk_skip_transcoder", "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"),
    ],
)
def test_places_and_kinds(name, architecture, reads, writes):
    sae = load(case(name)[0])
    assert (sae.architecture, str(sae.hook_point), str(sae.hook_points_out[0])) == (architecture, reads, writes)
    groups = 3 if architecture == "groupmax" else 1
    assert (sae.selection.groups, sae.selection.k) == (groups, 3 // groups)


def test_a_transcoder_of_a_whole_layer(copy):
    sae = load(copy("transcode", hookpoint="layers.3"))
    assert (str(sae.hook_point), str(sae.hook_points_out[0])) == (
        "blocks.2.hook_resid_post",
        "blocks.3.hook_resid_post",
    )


def test_runs_with_several_seeds(copy):
    assert str(load(copy("topk", hookpoint="layers.5.mlp/seed1")).hook_point) == "blocks.5.hook_mlp_out"


def test_from_within_the_folder(copy, monkeypatch):
    monkeypatch.chdir(copy("topk", hookpoint="layers.7"))
    assert load(".").hook_point.layer == 7


def test_a_folder_of_another_name(copy):
    folder = copy("transcode", hookpoint="mine")
    with pytest.raises(SAEFormatError, match=r"mine.*\?hook="):
        load(folder)
    with pytest.raises(SAEFormatError, match=r"mine.*\?hook_out="):
        load(f"{folder}?hook=layers.1.mlp.input")
    sae = load(f"{folder}?hook=layers.1.mlp.input&hook_out=layers.1.mlp")
    assert (str(sae.hook_point), str(sae.hook_points_out[0])) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")


def test_the_same_files_in_another_layer_are_another_sae(copy):
    folder = copy("topk")
    first = load(folder).sha256
    assert load(folder.rename(folder.parent / "layers.4")).sha256 != first


def test_signed_keeps_the_largest_magnitudes(copy):
    """`signed` of version 0.1, `sae/sae.py`: ranked by magnitude and kept with their signs, without a ReLU."""
    folder = copy("topk", config={"signed": True, "activation": None})
    x = case("topk")[1].x.double()
    w = {name: tensor.double() for name, tensor in load_file(folder / "sae.safetensors").items()}
    pre_acts = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    top = pre_acts.abs().topk(3, dim=-1).indices
    acts = torch.zeros_like(pre_acts).scatter(-1, top, pre_acts.gather(-1, top))
    sae = load(folder)
    assert sae.architecture == "abstopk"
    # A tie may go to either of two features; their sum cannot tell.
    ours = sae.encode(x)
    for first, second in ((4, 5), (20, 21)):
        for tensor in (ours, acts):
            tensor[:, first] += tensor[:, second]
            tensor[:, second] = 0.0
    assert_close(ours, acts)


def test_k_can_be_given():
    folder, answers = case("topk")
    assert int((load(f"{folder}?k=2").encode(answers.x) > 0).sum(-1).max()) == 2


@pytest.mark.parametrize(
    ("name", "tensors", "config", "says"),
    [
        ("topk", {"W_dec": None}, {}, "W_dec is missing"),
        ("topk", {"W_dec": torch.zeros(16, 48)}, {}, "it is transposed"),
        ("topk", {"encoder.weight": torch.zeros(16, 48)}, {}, "it is transposed"),
        ("topk", {"b_dec": torch.zeros(17)}, {}, "b_dec has shape [17], expected [16]"),
        ("topk", {"b_dec": torch.zeros(16, dtype=torch.int8)}, {}, "dtype I8"),
        ("topk", {"encoder.bias": torch.full((48,), torch.inf)}, {}, "not finite"),
        ("topk", {"log_threshold": torch.zeros(48)}, {}, "not supported: log_threshold"),
        ("topk_skip", {}, {"skip_connection": False}, "not supported: W_skip"),
        ("topk", {}, {"skip_connection": True}, "W_skip is missing"),
        ("topk", {}, {"activation": "binary"}, "activation='binary' is not supported"),
        ("topk", {}, {"k": 0}, "k must be a positive integer"),
        ("topk", {}, {"k": 49}, "k=49 is larger than num_latents=48"),
        ("topk", {}, {"d_in": None}, "d_in must be a positive integer"),
        ("topk", {}, {"num_latents": 0, "expansion_factor": None}, "expansion_factor must be a positive integer"),
        ("groupmax", {}, {"k": 7}, "cannot be divided into k=7 groups"),
    ],
)
def test_broken_checkpoints(copy, name, tensors, config, says):
    with pytest.raises(SAEFormatError) as caught:
        load(copy(name, tensors, config))
    assert says in str(caught.value)


def test_groupmax_has_no_other_k():
    with pytest.raises(SAEFormatError, match="k=2 has no use"):
        load(f"{case('groupmax')[0]}?k=2")


# Section 2.5 of the notes on formats: what SAELens 6.54 makes of the same folders. `saelens_error` is where its loader
# ends; `saelens_activations` is its answer once W_dec is turned back and the width is put right.


@pytest.mark.parametrize("name", CASES)
def test_saelens_transposes_the_decoder(name):
    folder, answers = case(name)
    assert "size mismatch for W_dec" in answers.notes["saelens_error"]
    # sparsify creates W_dec as a copy of encoder.weight: [num_latents, d_in].
    weights = load_file(folder / "sae.safetensors")
    assert weights["W_dec"].shape == weights["encoder.weight"].shape == (48, 16)
    assert torch.equal(load(folder).rows(7).decoder, weights["W_dec"][7])


@pytest.mark.parametrize(
    ("name", "agrees"),
    [
        # It subtracts b_dec where the decoder is not normalised; sparsify does where the coder is no transcoder.
        ("topk_decoder_not_normalized", True),
        ("topk", False),
        ("topk_mlp", False),
        ("topk_embed_tokens", False),
        # Neither subtracts it here.
        ("transcode", True),
        ("transcode_skip", True),
        # It has no GroupMax and takes it for TopK.
        ("groupmax", False),
    ],
)
def test_saelens_decides_by_the_wrong_key_whether_to_subtract_b_dec(name, agrees):
    folder, answers = case(name)
    clear = answers.unambiguous
    theirs, library = answers.tensors["saelens_activations"][clear], answers.activations[clear]
    assert torch.allclose(theirs, library, atol=1e-4) == agrees
    assert_close(load(folder).encode(answers.x)[clear], library)


@pytest.mark.parametrize("name", ["transcode_skip", "topk_skip"])
def test_saelens_leaves_out_the_skip_connection(name):
    folder, answers = case(name)
    clear = answers.unambiguous
    x, library = answers.x[clear], answers.tensors["reconstruction"][clear]
    assert not torch.allclose(answers.tensors["saelens_reconstruction"][clear], library, atol=1e-2)
    sae = load(folder)
    assert_close(sae.decode(sae.encode(x), x), library)


def test_saelens_takes_every_module_of_a_layer_for_its_residual_stream():
    for name, place in (("topk_mlp", "blocks.3.hook_mlp_out"), ("transcode", "blocks.3.mlp.hook_in")):
        folder, answers = case(name)
        assert answers.notes["saelens_hook_name"] == "blocks.3.hook_resid_post"
        assert str(load(folder).hook_point) == place


@pytest.mark.parametrize("name", CASES)
def test_converted_it_gives_the_same(name, tmp_path):
    folder, answers = case(name)
    sae = load(folder)
    save_saelens(sae, tmp_path / "converted")
    converted = load(tmp_path / "converted")
    assert_close(converted.encode(answers.x), sae.encode(answers.x))
    assert_close(converted.decode(answers.activations, answers.x), sae.decode(answers.activations, answers.x))
    assert (converted.hook_points, converted.hook_points_out) == (sae.hook_points, sae.hook_points_out)
