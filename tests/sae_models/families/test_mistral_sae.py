"""mistral-sae's checkpoints against what its own class answers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_models import SAEFormatError, load
from sae_models.saelens_writer import save_saelens
from tests.sae_models.families.expected import FIXTURES, assert_close, assert_same_answers, expected, open_pickle

FAMILY = FIXTURES / "mistral_sae"
PTH = FAMILY / "pth" / "mistral-7b.pth"
SAFETENSORS = FAMILY / "safetensors" / "mistral-7b-layer16" / "sae.safetensors"


@pytest.fixture
def copy(tmp_path):
    """`copy(tensors, name)`: the safetensors case with some of it changed; None takes a tensor out."""

    def change(tensors=None, name="mistral-7b-layer16/sae.safetensors") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        state = load_file(SAFETENSORS) | (tensors or {})
        save_file({key: value for key, value in state.items() if value is not None}, path)
        return path

    return change


def test_the_answers_of_the_library():
    answers = expected(FAMILY / "safetensors" / "expected.safetensors")
    for location in (SAFETENSORS, SAFETENSORS.parent):
        sae = load(f"{location}?k={answers.notes['k']}")
        assert_same_answers(sae, answers)
        assert (sae.d_in, sae.d_out, sae.d_sae, sae.selection.k) == (16, 16, 48, 3)
        assert (sae.family, sae.architecture, sae.token_norm) == ("mistral-sae", "topk", "layer_norm")
        assert str(sae.hook_point) == "blocks.16.hook_resid_post"
        assert sae.hook_points == sae.hook_points_out


def test_the_answers_of_the_library_for_its_pickle():
    answers = expected(FAMILY / "pth" / "expected.safetensors")
    location = f"{PTH}?k={answers.notes['k']}&hook=blocks.{answers.notes['layer']}.hook_resid_post"
    with pytest.raises(SAEFormatError, match=r"is a pickle.*steer-server sae convert"):
        load(location)
    assert_same_answers(load(location, open_pickle=open_pickle), answers)


def test_what_the_file_does_not_say():
    with pytest.raises(SAEFormatError, match=r"\?k=N.*128"):
        load(SAFETENSORS)
    with pytest.raises(SAEFormatError, match=r"\?hook="):
        load(f"{PTH}?k=3", open_pickle=open_pickle)


def test_the_layer_in_the_name_of_a_downloaded_repository(copy):
    path = copy(name="models--tylercosgrove--mistral-7b-sparse-autoencoder-layer16/snapshots/0123/sae.safetensors")
    assert load(f"{path}?k=3").hook_point.layer == 16


def test_the_same_weights_in_another_layer_are_another_sae(copy):
    first, second = copy(), copy(name="mistral-7b-layer17/sae.safetensors")
    assert load(f"{first}?k=3").sha256 != load(f"{second}?k=3").sha256


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"w_enc": torch.zeros(48, 16)}, "it is transposed"),
        ({"w_dec": torch.zeros(16, 48)}, "it is transposed"),
        ({"b_pre": torch.zeros(1, 16)}, "b_pre is missing or no vector"),
        ({"b_enc": torch.zeros(48, dtype=torch.int32)}, "dtype I32"),
        ({"w_enc": torch.full((16, 48), torch.nan)}, "not finite"),
        ({"threshold": torch.zeros(48)}, "not supported: threshold"),
        # Without one of its four tensors nothing says that it is of this family.
        ({"b_pre": None}, "not a checkpoint of a supported family"),
    ],
)
def test_broken_checkpoints(copy, tensors, says):
    with pytest.raises(SAEFormatError) as caught:
        load(f"{copy(tensors)}?k=3")
    assert says in str(caught.value)


def test_k_is_more_than_there_are():
    with pytest.raises(SAEFormatError, match="k=49 is larger"):
        load(f"{SAFETENSORS}?k=49")


def test_converted_it_gives_the_same(tmp_path):
    answers = expected(FAMILY / "safetensors" / "expected.safetensors")
    sae = load(f"{SAFETENSORS}?k=3")
    save_saelens(sae, tmp_path / "converted")
    converted = load(tmp_path / "converted")
    assert_close(converted.encode(answers.x), sae.encode(answers.x))
    assert_close(converted.decode(answers.activations, answers.x), sae.decode(answers.activations, answers.x))
