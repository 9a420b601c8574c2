"""Gemma Scope's npz files against the equations of its report, and what their paths say."""

import shutil

import pytest
import torch

from sae_models import HookPoint, SAEFormatError, load
from sae_models.saelens_writer import save_saelens
from tests.sae_models.families.changes import copied
from tests.sae_models.families.expected import FIXTURES, assert_close, assert_same_answers, expected

FAMILY = FIXTURES / "gemma_scope"
PLACES = {
    "res": (HookPoint(3), "google/gemma-2-2b"),
    "mlp": (HookPoint(3, "mlp_out"), "google/gemma-2-9b"),
    "att": (HookPoint(3, "hook_z"), "google/gemma-2-2b"),
    "it": (HookPoint(3), "google/gemma-2-9b-it"),
    "embedding": (HookPoint(0, "embed"), "google/gemma-2-2b"),
}


def case(name):
    answers = expected(FAMILY / name / "expected.safetensors")
    return FAMILY / name / answers.notes["checkpoint"], answers


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_SERVER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", PLACES)
def test_the_answers_of_the_equations(name):
    folder, answers = case(name)
    for location in (folder, folder / "params.npz"):
        sae = load(location)
        assert_same_answers(sae, answers)
        assert (sae.d_in, sae.d_out, sae.d_sae, sae.selection) == (16, 16, 48, None)
        assert (sae.family, sae.architecture, sae.token_norm) == ("Gemma Scope", "jumprelu", "none")
        assert (sae.hook_points, sae.model_name) == ((PLACES[name][0],), PLACES[name][1])
        assert not sae.is_transcoder
    assert sae.hook_point.armable == (name in ("res", "mlp", "it"))


def test_transcoders():
    folder, answers = case("transcoder")
    sae = load(folder)
    assert_same_answers(sae, answers)
    assert (sae.architecture, sae.model_name) == ("jumprelu_transcoder", "google/gemma-2-2b")
    assert (sae.hook_points, sae.hook_points_out) == ((HookPoint(3, "ln2_normalized"),), (HookPoint(3, "mlp_out"),))


@pytest.mark.parametrize("name", ["res", "transcoder"])
def test_written_as_saelens_and_read_again(name, tmp_path):
    folder, answers = case(name)
    save_saelens(load(folder), tmp_path / "out")
    assert_same_answers(load(tmp_path / "out"), answers)


def test_saelens_agrees_but_for_the_bias_of_embeddings():
    """Embeddings are sqrt(d) times what the SAE saw, and so is all of its reconstruction, b_dec too.

    SAELens 6.54 multiplies `W_dec` alone: what it reconstructs is (sqrt(d) - 1) b_dec away from what was trained.
    """
    for name in (*PLACES, "transcoder"):
        folder, answers = case(name)
        theirs = answers.tensors["saelens_reconstruction"]
        assert_close(answers.tensors["saelens_activations"], answers.activations)
        if name != "embedding":
            assert_close(theirs, answers.tensors["reconstruction"])
            continue
        sae = load(folder)
        missing = sae.weights.b_dec * (sae.d_in**0.5 - 1)
        assert float(missing.abs().max()) > 1
        assert_close(sae.decode(sae.encode(answers.x), answers.x) - missing, theirs)


def test_the_layout_of_a_hugging_face_cache(tmp_path):
    """Its snapshots are links to files that are named after their checksums."""
    folder, answers = case("transcoder")
    repository = tmp_path / "models--google--gemma-scope-2b-pt-transcoders"
    blob = repository / "blobs" / "0a1b"
    snapshot = repository / "snapshots" / "fd57" / "layer_3/width_16k/average_l0_71"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.copy(folder / "params.npz", blob)
    (snapshot / "params.npz").symlink_to(blob)
    for location in (snapshot, snapshot / "params.npz"):
        sae = load(location)
        assert_same_answers(sae, answers)
        assert (sae.model_name, sae.hook_points) == ("google/gemma-2-2b", (HookPoint(3, "ln2_normalized"),))


def test_what_the_path_does_not_say(tmp_path):
    folder, answers = case("res")
    alone = copied(folder, tmp_path / "layer_3")
    with pytest.raises(SAEFormatError, match=r"do not say where it reads; add \?hook="):
        load(alone)
    sae = load(f"{alone}?hook=blocks.3.hook_resid_post&model=google/gemma-2-2b")
    assert_same_answers(sae, answers)
    assert (sae.hook_points, sae.model_name) == ((HookPoint(3),), "google/gemma-2-2b")
    # Only transcoders read there.
    for place in ("blocks.3.ln2.hook_normalized", "model.layers.3.mlp.input"):
        with pytest.raises(SAEFormatError, match=r"do not say where it writes; add \?hook_out="):
            load(f"{alone}?hook={place}")
    both = f"{alone}?hook=blocks.3.ln2.hook_normalized&hook_out=blocks.3.hook_mlp_out"
    assert load(both).architecture == "jumprelu_transcoder"
    without_layer = copied(case("transcoder")[0], tmp_path / "gemma-scope-2b-pt-transcoders")
    with pytest.raises(SAEFormatError, match="where it writes"):
        load(f"{without_layer}?hook=blocks.3.hook_resid_post")


def test_the_same_weights_in_another_place_are_another_sae(tmp_path):
    folder, _ = case("res")
    first, second = (
        copied(folder, tmp_path / "gemma-scope-2b-pt-res" / f"layer_{layer}" / "width_16k" / "average_l0_71")
        for layer in (3, 4)
    )
    assert load(first).sha256 != load(second).sha256
    assert load(second).hook_point == HookPoint(4)
    assert load(f"{second}?hook=blocks.9.hook_resid_post").hook_point == HookPoint(9)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"threshold": None}, r"tensor threshold is missing; found: W_dec, W_enc, b_dec, b_enc"),
        ({"b_enc": None}, "tensor b_enc is missing"),
        ({"b_dec": torch.zeros(1, 16)}, r"b_dec has shape \[1, 16\], expected a vector"),
        ({"b_dec": torch.zeros(15)}, r"W_enc has shape \[16, 48\], expected \[15, 48\]"),
        ({"W_enc": torch.zeros(48, 16)}, r"expected \[16, 48\] \(it is transposed\)"),
        ({"W_dec": torch.zeros(16, 48)}, r"expected \[48, 16\] \(it is transposed\)"),
        ({"threshold": torch.zeros(16)}, r"threshold has shape \[16\], expected \[48\]"),
        ({"W_dec": torch.zeros(48, 16, dtype=torch.int32)}, "W_dec.npy has dtype int32"),
        ({"b_enc": torch.full((48,), float("nan"))}, "b_enc holds values that are not finite"),
        ({"W_enc": torch.full((16, 48), float("inf"))}, "W_enc holds values that are not finite"),
        ({"scaling_factor": torch.ones(48)}, "not supported: scaling_factor"),
    ],
)
def test_broken_checkpoints(tmp_path, tensors, says):
    folder, _ = case("res")
    broken = copied(folder, tmp_path / "gemma-scope-2b-pt-res/layer_3/width_16k/x", tensors=tensors)
    with pytest.raises(SAEFormatError, match=says):
        load(broken)


def test_options_without_a_use():
    folder, _ = case("res")
    with pytest.raises(SAEFormatError, match=r"k=3 has no use"):
        load(f"{folder}?k=3")
