"""dictionary_learning's checkpoints against what its own classes, and SAELens' loader for them, answer."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sae_models import SAEFormatError, load
from sae_models.families import dictionary_learning
from sae_models.saelens_writer import save_saelens
from tests.sae_models.families.expected import (
    FIXTURES,
    assert_close,
    assert_same_answers,
    expected,
    open_pickle,
)

CASES = {
    folder.name: folder for family in ("dictionary_learning", "switch_sae") for folder in (FIXTURES / family).iterdir()
}
LOADED = sorted(name for name in CASES if not name.startswith(("batchtopk_un", "matryoshka_un")))


def case(name):
    answers = expected(CASES[name] / "expected.safetensors")
    return CASES[name] / answers.notes["checkpoint"], answers


def opened(location):
    return load(location, open_pickle=open_pickle)


@pytest.fixture
def copy(tmp_path):
    """`copy(case, tensors, trainer, buffer)`: a case with some of it changed; None takes a tensor or key out."""

    def change(name, tensors=None, trainer=None, buffer=None) -> Path:
        source, _ = case(name)
        folder = tmp_path / source.parent.name / source.name
        shutil.copytree(source, folder)
        state = torch.load(folder / "ae.pt", weights_only=True) | (tensors or {})
        torch.save({key: value for key, value in state.items() if value is not None}, folder / "ae.pt")
        config = json.loads((folder / "config.json").read_text())
        for part, changes in (("trainer", trainer), ("buffer", buffer)):
            merged = config[part] | (changes or {})
            config[part] = {key: value for key, value in merged.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


@pytest.mark.parametrize("name", LOADED)
def test_the_answers_of_the_library(name):
    folder, answers = case(name)
    sae = opened(folder)
    assert_same_answers(sae, answers)
    assert (sae.d_in, sae.d_out, sae.d_sae) == (16, 16, 48)
    assert (sae.family, sae.token_norm, sae.skip_first) == ("dictionary_learning", "none", 0)
    assert sae.architecture in dictionary_learning.ARCHITECTURES
    assert sae.hook_points_out == sae.hook_points
    assert sae.name == answers.notes["checkpoint"]
    assert opened(folder / "ae.pt").sha256 == sae.sha256


@pytest.mark.parametrize(
    ("name", "architecture", "k"),
    [
        ("standard", "relu", None),
        ("new", "relu", None),
        ("gated", "gated", None),
        ("jumprelu", "jumprelu", None),
        ("topk", "topk", 3),
        ("batchtopk", "batchtopk", None),
        ("matryoshka", "matryoshka", None),
        ("switch", "switch", 3),
    ],
)
def test_architectures(name, architecture, k):
    folder, _ = case(name)
    sae = opened(folder)
    assert sae.architecture == architecture
    assert (sae.selection.k if sae.selection else None) == k
    assert sae.model_name in ("EleutherAI/pythia-70m-deduped", "openai-community/gpt2")


def test_a_pickle_is_not_opened_by_a_server():
    folder, _ = case("topk")
    with pytest.raises(SAEFormatError, match=r"is a pickle.*steer-server sae convert"):
        load(folder)


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_an_uncalibrated_threshold_has_to_be_given(name):
    folder, _ = case(f"{name}_uncalibrated")
    with pytest.raises(SAEFormatError, match=r"threshold=-1\.0.*\?threshold="):
        opened(folder)
    sae = opened(f"{folder}?threshold=0.5")
    assert torch.equal(sae.thresholds(), torch.full((48,), 0.5))


def test_a_threshold_that_is_there_is_not_overruled():
    folder, _ = case("batchtopk")
    with pytest.raises(SAEFormatError, match=r"threshold=0\.9 has no use"):
        opened(f"{folder}?threshold=0.9")


def test_an_old_topk_has_k_in_its_configuration_only(copy):
    assert opened(copy("topk", {"k": None, "threshold": None})).selection.k == 3


def test_an_old_batchtopk_has_no_threshold(copy):
    with pytest.raises(SAEFormatError, match=r"threshold=None.*\?threshold="):
        opened(copy("batchtopk", {"k": None, "threshold": None}))


def test_k_can_be_given():
    folder, answers = case("topk")
    x = answers.x
    assert int((opened(f"{folder}?k=5").encode(x) > 0).sum(-1).max()) == 5


@pytest.mark.parametrize(
    ("trainer", "buffer", "place"),
    [
        ({}, {}, "blocks.3.hook_resid_post"),
        ({"submodule_name": None}, {}, "blocks.3.hook_resid_post"),
        ({"submodule_name": "mlp_out_layer_3"}, {}, "blocks.3.hook_mlp_out"),
        ({"submodule_name": "attention_out_layer_3"}, {}, "blocks.3.hook_attn_out"),
        ({"submodule_name": "gpt_neox.layers.3.mlp"}, {"io": "in"}, "blocks.3.mlp.hook_in"),
        ({"submodule_name": "gpt_neox.layers.3"}, {"io": "in"}, "blocks.2.hook_resid_post"),
    ],
)
def test_hook_points(copy, trainer, buffer, place):
    assert str(opened(copy("standard", None, trainer, buffer)).hook_point) == place


@pytest.mark.parametrize(
    ("trainer", "buffer", "says"),
    [
        ({"submodule_name": "resid_post_layer_3"}, {"io": "in"}, "?hook="),
        ({"submodule_name": "mine"}, {}, "?hook="),
        ({"layer": 4}, {}, "layer=4"),
        ({"layer": 4, "submodule_name": None}, {}, "?hook="),
        ({}, {"io": "in_and_out"}, "buffer.io='in_and_out'"),
    ],
)
def test_a_place_that_is_not_clear_has_to_be_given(copy, trainer, buffer, says):
    folder = copy("standard", None, trainer, buffer)
    with pytest.raises(SAEFormatError) as caught:
        opened(folder)
    assert says in str(caught.value)
    if "io" not in says:
        assert str(opened(f"{folder}?hook=blocks.5.hook_mlp_out").hook_point) == "blocks.5.hook_mlp_out"


def test_the_same_weights_at_another_place_are_another_sae(copy):
    folder = copy("standard")
    moved = folder.rename(folder.parent / "trainer_1")
    first = opened(moved).sha256
    config = json.loads((moved / "config.json").read_text())
    del config["trainer"]["submodule_name"]
    (moved / "config.json").write_text(json.dumps(config))
    assert opened(moved).sha256 != first


def test_andyrdts_skip_the_attention_sink(tmp_path):
    """Layout and sizes of andyrdt/saes-llama-3.1-8b-instruct, but for d_model."""
    folder = tmp_path / "resid_post_layer_3" / "trainer_1"
    folder.mkdir(parents=True)
    d_in, d_sae = 2, 131_072
    trainer = {
        "dict_class": "BatchTopKSAE",
        "activation_dim": d_in,
        "dict_size": d_sae,
        "k": 64,
        "layer": 3,
        "lm_name": "meta-llama/Llama-3.1-8B-Instruct",
        "submodule_name": "resid_post_layer_3",
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
    state = {
        "encoder.weight": torch.randn(d_sae, d_in),
        "encoder.bias": torch.zeros(d_sae),
        "decoder.weight": torch.randn(d_in, d_sae),
        "b_dec": torch.zeros(d_in),
        "k": torch.tensor(64, dtype=torch.int),
        "threshold": torch.tensor(0.5),
    }
    torch.save(state, folder / "ae.pt")
    assert opened(folder).skip_first == 1
    (folder / "config.json").write_text(
        json.dumps({"trainer": trainer | {"lm_name": "meta-llama/Llama-3.1-8B"}, "buffer": {"io": "out"}})
    )
    assert opened(folder).skip_first == 0


@pytest.mark.parametrize(
    ("name", "tensors", "trainer", "says"),
    [
        ("standard", {"encoder.bias": None}, {}, "encoder.bias is missing"),
        ("standard", {"encoder.weight": torch.zeros(16, 48)}, {}, "it is transposed"),
        ("standard", {"decoder.weight": torch.zeros(48, 16)}, {}, "it is transposed"),
        ("standard", {"bias": torch.zeros(17)}, {}, "bias has shape [17], expected [16]"),
        ("standard", {"bias": torch.zeros(16, dtype=torch.int32)}, {}, "dtype torch.int32"),
        ("standard", {"encoder.bias": torch.full((48,), torch.nan)}, {}, "not finite"),
        ("standard", {"router.weight": torch.zeros(4, 16)}, {}, "not supported: router.weight"),
        ("standard", {}, {"dict_class": "IdentityDict"}, "dict_class='IdentityDict' is not supported"),
        ("standard", {}, {"dict_class": ["AutoEncoder"]}, "is not supported"),
        ("standard", {}, {"dict_size": 0}, "dict_size must be a positive integer"),
        ("jumprelu", {"threshold": torch.zeros(())}, {}, "threshold has shape []"),
        ("batchtopk", {"threshold": torch.tensor(torch.nan)}, {}, "not finite"),
        ("topk", {}, {"k": 4}, "k=4 in config.json and k=3 in ae.pt"),
        ("topk", {"k": None}, {"k": 49}, "k=49 is larger"),
        ("topk", {"k": None}, {"k": None}, "k must be a positive integer"),
        ("matryoshka", {"group_sizes": torch.tensor([8, 8])}, {}, "group_sizes=[8, 8]"),
        ("switch", {}, {"experts": 5}, "router.weight has shape [4, 16], expected [5, 16]"),
        ("switch", {"router.weight": torch.zeros(5, 16)}, {"experts": 5}, "cannot be divided among 5 experts"),
    ],
)
def test_broken_checkpoints(copy, name, tensors, trainer, says):
    with pytest.raises(SAEFormatError) as caught:
        opened(copy(name, tensors, trainer))
    assert says in str(caught.value)


def test_a_configuration_of_something_else(copy):
    folder = copy("standard")
    for text, says in (("{", "not JSON"), ("[]", "not a configuration"), ("{}", "no object `trainer`")):
        (folder / "config.json").write_text(text)
        with pytest.raises(SAEFormatError, match=says):
            opened(folder)


def test_a_switch_expert_with_fewer_features_than_k(copy):
    sae = opened(copy("switch", {}, {"k": 20}))
    assert sae.selection.k == 12


def test_heaviside_gives_what_the_expert_found():
    folder, answers = case("switch_heaviside")
    sae = opened(folder)
    W, b = sae.router()
    weights = sae.selection.route(answers.x @ W + b)
    assert set(weights.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", [name for name in LOADED if not name.startswith(("switch", "new"))])
def test_saelens_agrees_but_for_the_hook_point(name):
    _, answers = case(name)
    clear = answers.unambiguous
    assert_close(answers.tensors["saelens_activations"][clear], answers.activations[clear])
    # Trap: SAELens takes every dictionary for one of the residual stream; this one reads the MLP's output.
    assert answers.notes["saelens_hook_name"] == "blocks.3.hook_resid_post"
    place = "blocks.3.hook_mlp_out" if name == "standard_mlp_out" else "blocks.3.hook_resid_post"
    assert str(opened(case(name)[0]).hook_point) == place


def test_saelens_does_not_load_auto_encoder_new():
    folder, answers = case("new")
    # Trap: its b_dec is called `decoder.bias`, and it is not subtracted from the input.
    assert "b_dec" in answers.notes["saelens_error"]
    sae = opened(folder)
    assert sae.weights.input_map.shift is None
    assert torch.equal(sae.reconstruction_bias(), open_pickle(folder / "ae.pt").read("decoder.bias"))


@pytest.mark.parametrize("name", LOADED)
def test_converted_it_gives_the_same(name, tmp_path):
    folder, answers = case(name)
    save_saelens(opened(folder), tmp_path / "converted")
    sae = load(tmp_path / "converted")
    assert_close(sae.encode(answers.x), opened(folder).encode(answers.x))
    assert sae.hook_points == opened(folder).hook_points
