"""Llamascopium against the equations that it is trained with, and what its own folding changes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_models import HookPoint, SAEFormatError, Selection, load
from sae_models.saelens_writer import save_saelens
from sae_models.tensor_source import LoadedTensors
from tests.sae_models.families.changes import copied
from tests.sae_models.families.expected import FIXTURES, assert_close, assert_same_answers, expected

FAMILY = FIXTURES / "llamascopium"
CONFIG = "config.json"
CASES = {
    "relu": "relu",
    "jumprelu": "jumprelu",
    "jumprelu_without_decoder_norm": "jumprelu",
    "jumprelu_inference": "jumprelu",
    "jumprelu_transcoder": "jumprelu_transcoder",
    "topk": "topk",
    "topk_without_decoder_norm": "topk",
    "topk_transcoder": "topk_transcoder",
    "batchtopk": "batchtopk",
    "token_wise": "relu",
    "without_decoder_bias": "relu",
    "r1_distill": "jumprelu",
}


def case(name):
    answers = expected(FAMILY / name / "expected.safetensors")
    return FAMILY / name / answers.notes["checkpoint"], answers


def location(folder, answers):
    return f"{folder}?threshold={answers.notes['threshold']}" if "threshold" in answers.notes else str(folder)


@pytest.mark.parametrize("name", CASES)
def test_the_answers_of_the_equations(name):
    folder, answers = case(name)
    sae = load(location(folder, answers))
    assert_same_answers(sae, answers)
    assert (sae.d_in, sae.d_out, sae.d_sae) == (16, 16, 48)
    assert (sae.family, sae.architecture) == ("Llamascopium", CASES[name])
    reads, writes = (3, "ln2_normalized"), (3, "mlp_out")
    if not name.endswith("transcoder"):
        reads = writes = (3, "resid_post")
    assert (sae.hook_points, sae.hook_points_out) == ((HookPoint(*reads),), (HookPoint(*writes),))
    assert sae.selection == (Selection(3) if name.startswith("topk") else None)
    assert sae.token_norm == ("constant_norm" if name == "token_wise" else "none")
    assert sae.model_name == ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if name == "r1_distill" else None)


@pytest.mark.parametrize("name", CASES)
def test_activations_are_the_library_s_times_norms_of_decoder_rows(name):
    """The library divides what its activation function lets through by |d_i| again, and has it in training units."""
    folder, answers = case(name)
    theirs, sae = answers.tensors["library_activations"].double(), load(location(folder, answers))
    if name.endswith("without_decoder_norm"):
        assert_close(sae.encode(answers.x)[answers.unambiguous], theirs[answers.unambiguous])
        return
    state = load_file(folder / "sae_weights.safetensors")
    decoder = state["W_D"] if "W_D" in state else state["decoder.weight"].T
    s_out = {"token_wise": 1.0, "jumprelu_inference": 1.0, "jumprelu_transcoder": 4.0, "topk_transcoder": 4.0}
    unit = decoder.double().norm(dim=1) / s_out.get(name, 2.0)
    assert_close(sae.encode(answers.x)[answers.unambiguous], (theirs * unit)[answers.unambiguous])
    assert torch.allclose(sae.decoder().norm(dim=1), torch.ones(48))


@pytest.mark.parametrize("name", CASES)
def test_written_as_saelens_and_read_again(name, tmp_path):
    folder, answers = case(name)
    save_saelens(load(location(folder, answers)), tmp_path / "out")
    assert_same_answers(load(tmp_path / "out"), answers)


def folded(folder, target):
    """A copy as the library's `standardize_parameters_of_dataset_norm` and `save_pretrained` leave it."""
    state = load_file(folder / "sae_weights.safetensors")
    config = json.loads((folder / CONFIG).read_text())
    s_in, s_out = (
        16**0.5 / float(state[f"dataset_average_activation_norm.{config[key]}"])
        for key in ("hook_point_in", "hook_point_out")
    )
    changed = {"b_E": state["b_E"] / s_in, "b_D": state["b_D"] / s_out, "W_D": state["W_D"] * (s_in / s_out)}
    copied(folder, target, CONFIG, config={"norm_activation": "inference"})
    save_file(state | changed, target / "sae_weights.safetensors")
    return target


@pytest.mark.parametrize("name", ["relu", "topk", "topk_transcoder", "topk_without_decoder_norm"])
def test_the_library_s_folding_keeps_relu_and_topk(name, tmp_path):
    folder, answers = case(name)
    sae = load(folded(folder, tmp_path / "folded"))
    activations = sae.encode(answers.x)
    clear = answers.unambiguous
    assert torch.equal(activations[clear] != 0, answers.activations[clear] != 0)
    assert_close(sae.decode(activations, answers.x)[clear], answers.tensors["reconstruction"][clear])


@pytest.mark.parametrize("name", ["jumprelu", "jumprelu_transcoder", "jumprelu_without_decoder_norm"])
def test_the_library_s_folding_changes_jumprelu(name, tmp_path):
    """It rescales what thresholds are compared with and leaves the thresholds as they are.

    So of a checkpoint that says `dataset-wise` the rule of training is ours, and one that says `inference`, which the
    library has folded, is another SAE: taken as it stands, it does what the library does with it.
    """
    folder, answers = case(name)
    trained = load(folder).encode(answers.x) != 0
    after = load(folded(folder, tmp_path / "folded")).encode(answers.x) != 0
    assert torch.equal(trained, answers.activations != 0)
    assert int((trained != after).sum()) > 100
    # With thresholds that took part in the folding it would be the same one.
    state = load_file(tmp_path / "folded" / "sae_weights.safetensors")
    key = "activation_function.log_jumprelu_threshold"
    scale = torch.tensor({"jumprelu": 2.0, "jumprelu_transcoder": 4.0}.get(name, 2.0))
    save_file(state | {key: state[key] - scale.log()}, tmp_path / "folded" / "sae_weights.safetensors")
    assert torch.equal(load(tmp_path / "folded").encode(answers.x) != 0, trained)


def test_saelens_leaves_decoder_norms_out_of_r1_distill_s_thresholds():
    """With `sparsity_include_decoder_norm` the activation function sees h_i |d_i|; SAELens 6.54 shows it h_i."""
    folder, answers = case("r1_distill")
    theirs, ours = answers.tensors["saelens_activations"], load(folder).encode(answers.x)
    assert int(((theirs != 0) != (ours != 0)).sum()) > 0
    both = (theirs != 0) & (ours != 0)
    assert_close(theirs * both, answers.tensors["library_activations"] * both)
    norm = load_file(folder / "sae_weights.safetensors")["decoder.weight"].norm(dim=0)
    assert bool((norm[((theirs == 0) & (ours != 0)).any(0)] > 1).all())


@pytest.mark.parametrize(
    ("name", "hook", "option", "value"),
    [
        ("jumprelu", "blocks.3.hook_resid_post", "norm", 2),
        ("jumprelu_transcoder", "blocks.3.ln2.hook_normalized", "norm", 4),
        ("jumprelu_transcoder", "blocks.3.hook_mlp_out", "norm_out", 1),
    ],
)
def test_missing_norms_are_asked_for(name, hook, option, value, tmp_path):
    folder, answers = case(name)
    without = copied(folder, tmp_path / "sae", tensors={f"dataset_average_activation_norm.{hook}": None})
    with pytest.raises(SAEFormatError, match=rf"add \?{option}=N"):
        load(without)
    assert_same_answers(load(f"{without}?{option}={value}"), answers)
    with pytest.raises(SAEFormatError, match="has no use"):
        load(f"{folder}?{option}={value}")


def test_batchtopk_needs_a_threshold():
    folder, _ = case("batchtopk")
    with pytest.raises(SAEFormatError, match=r"compares the tokens of a batch.*add \?threshold=N"):
        load(folder)


def test_a_smaller_k():
    folder, answers = case("topk")
    assert load(f"{folder}?k=2").selection == Selection(2)
    assert int((load(f"{folder}?k=2").encode(answers.x) != 0).sum(-1).max()) == 2


@pytest.mark.parametrize(
    ("sae_type", "says"),
    [
        ("crosscoder", "its features are read from several"),
        ("clt", "one cross-layer transcoder of all layers"),
        ("lorsa", "read other tokens"),
        ("molt", "its features are matrices"),
        ("mixcoder", "one modality each"),
        ("cnnsae", "sae_type='cnnsae' is not supported; supported: sae"),
    ],
)
def test_other_kinds_are_refused_with_the_reason(sae_type, says, tmp_path):
    folder, _ = case("relu")
    with pytest.raises(SAEFormatError, match=says):
        load(copied(folder, tmp_path / "sae", CONFIG, config={"sae_type": sae_type}))


@pytest.mark.parametrize(
    ("name", "tensors", "config", "says"),
    [
        ("relu", {"b_E": None}, None, "tensor b_E is missing"),
        ("relu", {"W_E": torch.zeros(48, 16)}, None, r"expected \[16, 48\] \(it is transposed\)"),
        ("relu", {"W_D": torch.zeros(16, 48)}, None, r"expected \[48, 16\] \(it is transposed\)"),
        ("relu", {"W_D": torch.zeros(48, 16, dtype=torch.bool)}, None, "W_D has dtype BOOL"),
        ("relu", {"W_D": torch.full((48, 16), float("nan"))}, None, "W_D holds values that are not finite"),
        ("relu", {"W_E_glu": torch.zeros(16, 48)}, None, "not supported: W_E_glu"),
        ("r1_distill", {"encoder.weight": torch.zeros(16, 48)}, None, r"expected \[48, 16\] \(it is transposed\)"),
        ("r1_distill", {"log_jumprelu_threshold": None}, None, "tensor log_jumprelu_threshold is missing"),
        (
            "jumprelu",
            {"activation_function.log_jumprelu_threshold": None},
            None,
            "tensor activation_function.log_jumprelu_threshold is missing",
        ),
        ("relu", {"dataset_average_activation_norm.blocks.3.hook_resid_post": torch.tensor(0.0)}, None, "got 0.0"),
        ("relu", {"dataset_average_activation_norm.blocks.3.hook_resid_post": torch.zeros(2)}, None, r"expected \[\]"),
        ("relu", None, {"use_glu_encoder": True}, "two rows"),
        ("relu", None, {"act_fn": "layertopk"}, "act_fn='layertopk' is not supported"),
        ("relu", None, {"norm_activation": "batch-wise"}, "depends on the others of its batch"),
        ("relu", None, {"expansion_factor": 0}, "expansion_factor must be a number over 0, got 0"),
        ("relu", None, {"expansion_factor": 3.5}, r"W_E has shape \[16, 48\], expected \[16, 56\]"),
        ("relu", None, {"use_decoder_bias": "yes"}, "use_decoder_bias must be true or false, got 'yes'"),
        ("relu", None, {"hook_point_in": 3}, "a hook point must be a name, got 3"),
        ("relu", None, {"hook_point_in": None, "hook_point_out": None}, r"do not say where it reads; add \?hook="),
        ("topk", None, {"top_k": 0}, "top_k must be a positive integer, got 0"),
        ("jumprelu_transcoder", None, {"norm_activation": "token-wise"}, "not supported for transcoders"),
    ],
)
def test_broken_checkpoints(tmp_path, name, tensors, config, says):
    folder, _ = case(name)
    with pytest.raises(SAEFormatError, match=says):
        load(copied(folder, tmp_path / "sae", CONFIG, tensors, config))


def test_a_hook_point_that_has_no_name_here_is_given_by_an_option(tmp_path):
    folder, answers = case("jumprelu")
    norm = "dataset_average_activation_norm.blocks.3."
    theirs = copied(
        folder,
        tmp_path / "sae",
        CONFIG,
        {f"{norm}hook_resid_post": None, f"{norm}resid_mid_after_ln": torch.tensor(2.0)},
        {"hook_point_in": "blocks.3.resid_mid_after_ln", "hook_point_out": "blocks.3.resid_mid_after_ln"},
    )
    with pytest.raises(SAEFormatError, match=r"'blocks.3.resid_mid_after_ln' is not known.*\?hook=NAME"):
        load(theirs)
    assert_same_answers(load(f"{theirs}?hook=model.layers.3.mlp.input"), answers)


def test_pickles_are_refused_and_nested_ones_are_read(tmp_path):
    folder, answers = case("jumprelu")
    copy = copied(folder, tmp_path / "sae")
    torch.save({"sae": load_file(copy / "sae_weights.safetensors"), "version": "2.0.0"}, copy / "sae_weights.pt")
    (copy / "sae_weights.safetensors").unlink()
    with pytest.raises(SAEFormatError, match=r"is a pickle.*steer-server sae convert"):
        load(copy)
    assert_same_answers(load(copy, open_pickle=flat), answers)


def flat(path):
    """Tensors of a nested state dict, by their names joined with dots."""
    state = torch.load(path, weights_only=True)["sae"]
    return LoadedTensors(path, {f"sae.{name}": value for name, value in state.items()})
