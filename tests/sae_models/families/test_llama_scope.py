"""Llama Scope against the equations of the lm-saes that wrote it, and where SAELens reads it otherwise."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sae_models import HookPoint, SAEFormatError, Selection, load
from sae_models.saelens_writer import save_saelens
from sae_models.tensor_source import LoadedTensors
from tests.sae_models.families.changes import copied
from tests.sae_models.families.expected import FIXTURES, assert_close, assert_same_answers, expected

FAMILY = FIXTURES / "llama_scope"
CONFIG = "hyperparams.json"
RESID = (HookPoint(3),)
CASES = {
    "residual": ("jumprelu", RESID),
    "mlp": ("jumprelu", (HookPoint(3, "mlp_out"),)),
    "without_decoder_norm": ("jumprelu", RESID),
    "b_dec_read": ("jumprelu", RESID),
    "relu": ("relu", RESID),
    "topk": ("topk", RESID),
    "token_wise": ("jumprelu", RESID),
    "transcoder": ("jumprelu_transcoder", (HookPoint(3, "ln2_normalized"),)),
}


def case(name):
    answers = expected(FAMILY / name / "expected.safetensors")
    return FAMILY / name / answers.notes["checkpoint"], answers


@pytest.mark.parametrize("name", CASES)
def test_the_answers_of_the_equations(name):
    folder, answers = case(name)
    architecture, reads = CASES[name]
    for location in (folder, folder / "checkpoints" / "final.safetensors"):
        sae = load(location)
        assert_same_answers(sae, answers)
        assert (sae.d_in, sae.d_out, sae.d_sae) == (16, 16, 48)
        assert (sae.family, sae.architecture, sae.hook_points) == ("Llama Scope", architecture, reads)
        assert sae.hook_points_out == ((HookPoint(3, "mlp_out"),) if name == "transcoder" else reads)
        assert sae.selection == (Selection(3) if name == "topk" else None)
        assert sae.token_norm == ("constant_norm" if name == "token_wise" else "none")
        assert (sae.name, sae.model_name) == (folder.name, "meta-llama/Llama-3.1-8B")


@pytest.mark.parametrize("name", CASES)
def test_written_as_saelens_and_read_again(name, tmp_path):
    folder, answers = case(name)
    save_saelens(load(folder), tmp_path / "out")
    assert_same_answers(load(tmp_path / "out"), answers)


@pytest.mark.parametrize("name", ["residual", "mlp", "transcoder"])
def test_decoder_rows_have_unit_norm_and_thresholds_are_the_published_one(name):
    folder, _ = case(name)
    sae = load(folder)
    threshold = json.loads((folder / CONFIG).read_text())["jump_relu_threshold"]
    assert torch.allclose(sae.decoder().norm(dim=-1), torch.ones(48))
    assert {sae.rows(feature).threshold for feature in range(48)} == {threshold}


def test_saelens_leaves_decoder_norms_out_of_the_threshold():
    """The threshold was measured on activations times norms of decoder rows, h_i |d_i| / s.

    SAELens 6.54 compares h_i / s with it. Where rows have a norm below 1 it turns on features that are off, and above
    1 it leaves off features that are on. Where a checkpoint is without `sparsity_include_decoder_norm` both agree.
    """
    folder, answers = case("residual")
    theirs, ours = answers.tensors["saelens_activations"], load(folder).encode(answers.x)
    s = 16**0.5 / 2.0
    norm = load_file(folder / "checkpoints" / "final.safetensors")["decoder.weight"].double().norm(dim=0)
    both = (theirs != 0) & (ours != 0)
    assert_close(torch.where(both, theirs * norm / s, 0.0), torch.where(both, ours, 0.0))
    wrongly_on, wrongly_off = (theirs != 0) & (ours == 0), (theirs == 0) & (ours != 0)
    assert int(wrongly_on.sum()) > 0
    assert int(wrongly_off.sum()) > 0
    assert bool((norm[wrongly_on.any(0)] < 1).all())
    assert bool((norm[wrongly_off.any(0)] > 1).all())
    _, agreeing = case("without_decoder_norm")
    assert_close(agreeing.tensors["saelens_reconstruction"], agreeing.tensors["reconstruction"])
    assert torch.equal(agreeing.tensors["saelens_activations"] != 0, agreeing.activations != 0)


def test_saelens_has_one_norm_for_transcoders():
    """It has no transcoders in its table; its loader takes one for an SAE, and unscales outputs by the input's norm."""
    folder, answers = case("transcoder")
    assert answers.notes["saelens_class"] == "JumpReLUSAE"
    difference = answers.tensors["saelens_reconstruction"] - answers.tensors["reconstruction"]
    assert float(difference.abs().max()) > 10
    assert load(folder).is_transcoder


@pytest.mark.parametrize(
    ("name", "says"),
    [("residual", r"of what it reads is missing; add \?norm=N"), ("transcoder", r"reads is missing; add \?norm=N")],
)
def test_missing_norms_are_asked_for(name, says, tmp_path):
    folder, answers = case(name)
    norms = json.loads((folder / CONFIG).read_text())["dataset_average_activation_norm"]
    without = copied(folder, tmp_path / "L3", CONFIG, config={"dataset_average_activation_norm": None})
    with pytest.raises(SAEFormatError, match=says):
        load(without)
    options = f"?norm={norms['in']}&model=meta-llama/Llama-3.1-8B"
    if name == "transcoder":
        with pytest.raises(SAEFormatError, match=r"of what it writes is missing; add \?norm_out=N"):
            load(f"{without}{options}")
        options += f"&norm_out={norms['out']}"
    assert_same_answers(load(f"{without}{options}"), answers)
    with pytest.raises(SAEFormatError, match=r"norm=2.0 has no use"):
        load(f"{case('residual')[0]}?norm=2")


@pytest.mark.parametrize("value", [None, 0.0, -1])
def test_a_threshold_that_is_not_set_is_asked_for(value, tmp_path):
    folder, answers = case("residual")
    without = copied(folder, tmp_path / "L3", CONFIG, config={"jump_relu_threshold": value})
    with pytest.raises(SAEFormatError, match=rf"got {value}; add \?threshold=N"):
        load(without)
    assert_same_answers(load(f"{without}?threshold=0.5"), answers)


def test_pickles_are_refused_and_nested_ones_are_read(tmp_path):
    folder, answers = case("residual")
    copy = copied(folder, tmp_path / "L3")
    final = copy / "checkpoints" / "final.safetensors"
    torch.save({"sae": load_file(final), "version": "0.1.0"}, copy / "checkpoints" / "final.pt")
    assert_same_answers(load(copy), answers)
    final.unlink()
    with pytest.raises(SAEFormatError, match=r"is a pickle.*steer-server sae convert"):
        load(copy)
    assert_same_answers(load(copy, open_pickle=flat), answers)
    (copy / "sae_weights.dcp").mkdir()
    with pytest.raises(SAEFormatError, match=r"sae_weights.dcp is a checkpoint of torch.distributed"):
        load(copy)


def flat(path):
    """Tensors of a nested state dict, by their names joined with dots."""
    return LoadedTensors(
        path, {f"sae.{name}": value for name, value in torch.load(path, weights_only=True)["sae"].items()}
    )


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({"encoder.bias": None}, None, "tensor encoder.bias is missing"),
        ({"encoder.weight": torch.zeros(16, 48)}, None, r"expected \[48, 16\] \(it is transposed\)"),
        ({"decoder.weight": torch.zeros(48, 16)}, None, r"expected \[16, 48\] \(it is transposed\)"),
        ({"decoder.weight": torch.zeros(16, 48, dtype=torch.int64)}, None, "decoder.weight has dtype I64"),
        ({"decoder.bias": torch.full((16,), float("nan"))}, None, "decoder.bias holds values that are not finite"),
        ({"encoder_glu.weight": torch.zeros(48, 16)}, None, "not supported: encoder_glu.weight"),
        (None, {"use_glu_encoder": True}, "use_glu_encoder=true is not supported: .*two rows"),
        (None, {"d_sae": 49}, r"encoder.weight has shape \[48, 16\], expected \[49, 16\]"),
        (None, {"d_model": 0}, "d_model must be a positive integer, got 0"),
        (None, {"act_fn": "gelu"}, "act_fn='gelu' is not supported; supported: relu, topk, jumprelu"),
        (None, {"act_fn": None}, "has no act_fn; one of relu"),
        (None, {"norm_activation": None}, "has no norm_activation"),
        (None, {"norm_activation": "batch-wise"}, "depends on the others of its batch"),
        (
            None,
            {"sparsity_include_decoder_norm": None},
            "sparsity_include_decoder_norm must be true or false, got None",
        ),
        (None, {"dataset_average_activation_norm": {"in": 0, "out": 1}}, "must be a number over 0, got 0"),
        (None, {"dataset_average_activation_norm": 2.0}, "must have `in` and `out`, got 2.0"),
        (None, {"act_fn": "topk", "top_k": 49}, "k=49 is larger than d_sae=48"),
        (None, {"hook_point_in": None, "hook_point_out": None}, r"do not say where it reads; add \?hook="),
        (None, {"hook_point_in": "blocks.3.hook_elsewhere"}, "'blocks.3.hook_elsewhere' is not known"),
    ],
)
def test_broken_checkpoints(tmp_path, tensors, config, says):
    folder, _ = case("residual")
    with pytest.raises(SAEFormatError, match=says):
        load(copied(folder, tmp_path / "L3", CONFIG, tensors, config))


def test_a_transcoder_normed_by_token_is_refused(tmp_path):
    folder, _ = case("transcoder")
    with pytest.raises(SAEFormatError, match="token-wise' is not supported for transcoders"):
        load(copied(folder, tmp_path / "L3", CONFIG, config={"norm_activation": "token-wise"}))


def test_a_dead_feature_whose_decoder_row_is_zero(tmp_path):
    folder, answers = case("residual")
    weights = load_file(folder / "checkpoints" / "final.safetensors")["decoder.weight"].clone()
    weights[:, 7] = 0
    sae = load(copied(folder, tmp_path / "L3", CONFIG, {"decoder.weight": weights}))
    rows = sae.rows(7)
    assert (float(rows.encoder.abs().max()), rows.bias, float(rows.decoder.abs().max())) == (0.0, 0.0, 0.0)
    assert bool((sae.encode(answers.x)[:, 7] == 0).all())
