"""circuit-tracer's transcoders and cross-layer transcoders against what its own classes answer."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sae_models import SAEFormatError, load
from sae_models.families import circuit_tracer, clt
from sae_models.saelens_writer import save_saelens
from tests.sae_models.families.expected import FIXTURES, assert_close, assert_same_answers, expected

FAMILY = FIXTURES / "circuit_tracer"
SETS = [(name, layer) for name in ("relu", "relu_skip", "jumprelu", "jumprelu_skip") for layer in (0, 1)]
CROSS_LAYER = [(name, layer) for name in ("cross_layer_relu", "cross_layer_jumprelu") for layer in (0, 1, 2)]


def case(name, layer):
    answers = expected(FAMILY / name / f"expected_layer_{layer}.safetensors")
    file = f"W_enc_{layer}.safetensors" if name.startswith("cross_layer") else f"layer_{layer}.safetensors"
    return FAMILY / name / answers.notes["checkpoint"] / file, answers


@pytest.fixture
def copy(tmp_path):
    """`copy(case, layer, tensors, config)`: a case with some of it changed; None takes a tensor or key out."""

    def change(name, layer=0, tensors=None, config=None, file=None) -> Path:
        source, _ = case(name, layer)
        folder = tmp_path / "transcoders"
        shutil.copytree(source.parent, folder)
        path = folder / (file or source.name)
        state = load_file(path) | (tensors or {})
        save_file({key: value for key, value in state.items() if value is not None}, path)
        merged = yaml.safe_load((folder / "config.yaml").read_text()) | (config or {})
        (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in merged.items() if v is not None}))
        return folder / source.name

    return change


@pytest.mark.parametrize(("name", "layer"), SETS + CROSS_LAYER)
def test_the_answers_of_the_library(name, layer):
    path, answers = case(name, layer)
    sae = load(path)
    assert_same_answers(sae, answers)
    assert (sae.d_in, sae.d_out, sae.d_sae, sae.selection) == (16, 16, 48, None)
    assert (sae.name, sae.model_name, sae.token_norm) == (f"layer_{layer}", "Qwen/Qwen3-0.6B", "none")
    assert sae.is_transcoder
    assert sae.hook_point.layer == sae.hook_points_out[0].layer == layer


@pytest.mark.parametrize("layer", [0, 1])
def test_topk_has_to_be_said(layer):
    """The files do not say that it is TopK, and the library's loader takes it for ReLU; ours does too, unless told."""
    path, answers = case("topk", layer)
    as_relu = load(path)
    assert as_relu.architecture == "transcoder"
    assert_close(as_relu.encode(answers.x), answers.tensors["loaded_activations"])
    sae = load(f"{path}?k=3")
    assert sae.architecture == "topk_transcoder"
    assert_same_answers(sae, answers)
    # It has no ReLU.
    assert (sae.encode(answers.x) < 0).any()


@pytest.mark.parametrize(
    ("name", "architecture", "reads", "writes"),
    [
        ("relu", "transcoder", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"),
        ("relu_skip", "skip_transcoder", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"),
        ("jumprelu", "jumprelu_transcoder", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"),
        ("jumprelu_skip", "jumprelu_skip_transcoder", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"),
        ("cross_layer_relu", "clt_own_layer", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"),
        ("cross_layer_jumprelu", "jumprelu_clt_own_layer", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"),
    ],
)
def test_places_and_kinds(name, architecture, reads, writes):
    sae = load(case(name, 1)[0])
    assert (sae.architecture, str(sae.hook_point), str(sae.hook_points_out[0])) == (architecture, reads, writes)
    assert architecture in circuit_tracer.ARCHITECTURES + clt.ARCHITECTURES


def test_a_set_without_a_configuration(copy):
    """As mwhanna's for Qwen3-14B are published."""
    path = copy("relu", 1)
    (path.parent / "config.yaml").unlink()
    with pytest.raises(SAEFormatError, match=r"\?hook="):
        load(path)
    with pytest.raises(SAEFormatError, match=r"\?hook_out="):
        load(f"{path}?hook=blocks.1.mlp.hook_in")
    sae = load(f"{path}?hook=blocks.1.mlp.hook_in&hook_out=blocks.1.hook_mlp_out&model=Qwen/Qwen3-14B")
    assert (sae.model_name, sae.is_transcoder) == ("Qwen/Qwen3-14B", True)
    assert_close(sae.encode(case("relu", 1)[1].x), case("relu", 1)[1].activations)


def test_one_threshold_for_all(copy):
    path = copy("jumprelu", tensors={circuit_tracer.THRESHOLD: torch.tensor(0.5)})
    assert torch.equal(load(path).thresholds(), torch.full((48,), 0.5))


def test_a_threshold_below_zero_keeps_negative_activations(copy, tmp_path):
    """Its JumpReLU is x * (x > threshold), without a ReLU, unlike the architecture's own definition."""
    path = copy("jumprelu", tensors={circuit_tracer.THRESHOLD: torch.full((48,), -0.25)})
    w = load_file(path)
    x = case("jumprelu", 0)[1].x
    pre_acts = x @ w["W_enc"].T + w["b_enc"]
    sae = load(path)
    assert_close(sae.encode(x), pre_acts * (pre_acts > -0.25))
    with pytest.raises(SAEFormatError, match="negative activations cannot be written"):
        save_saelens(sae, tmp_path / "converted")


def test_the_same_file_in_another_layer_is_another_sae(copy):
    path = copy("relu", 0)
    first = load(path).sha256
    shutil.copy(path, path.with_name("layer_7.safetensors"))
    assert load(path.with_name("layer_7.safetensors")).sha256 != first


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("relu", {}, "a set of 2 transcoders; name the file of one, such as layer_0.safetensors"),
        ("cross_layer_relu", {}, "name the encoder of one layer"),
    ],
)
def test_a_folder_is_not_one_sae(copy, name, config, says):
    with pytest.raises(SAEFormatError) as caught:
        load(copy(name, config=config).parent)
    assert says in str(caught.value)


def test_a_set_that_lies_elsewhere(tmp_path):
    """As mntss/gemma-scope-transcoders is published."""
    uri = "hf://google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76/params.npz"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "transcoders": [uri]}))
    with pytest.raises(SAEFormatError, match=r"lie elsewhere; .*average_l0_76/params\.npz"):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set"}))
    with pytest.raises(SAEFormatError, match="are not beside config"):
        load(tmp_path)


def test_the_decoder_of_a_cross_layer_transcoder_is_not_named(copy):
    path = copy("cross_layer_relu", 1)
    with pytest.raises(SAEFormatError, match="name the encoder of one layer"):
        load(path.with_name("W_dec_1.safetensors"))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_saelens_sums_the_decoders_of_all_layers(layer):
    """SAELens 6.54, `mntss_clt_layer_huggingface_loader`: `W_dec.sum(dim=1)`, which is what no layer ever gets.

    The library writes the first of them to the layer's own output, and the others to later layers'.
    """
    path, answers = case("cross_layer_relu", layer)
    decoder = load_file(path.with_name(f"W_dec_{layer}.safetensors"))[f"W_dec_{layer}"]
    b_dec = load_file(path)[f"b_dec_{layer}"]
    assert decoder.shape == (48, 3 - layer, 16)
    summed = answers.activations @ decoder.sum(dim=1) + b_dec
    agrees = torch.allclose(summed, answers.tensors["reconstruction"], atol=1e-3)
    assert agrees == (layer == 2)
    assert_close(load(path).decode(answers.activations, answers.x), answers.tensors["reconstruction"])


@pytest.mark.parametrize(
    ("name", "tensors", "config", "says"),
    [
        ("relu", {"W_enc": None}, {}, "W_enc is missing"),
        ("relu", {"b_dec": None}, {}, "tensor b_dec is missing"),
        ("relu", {"b_enc": torch.zeros(1, 48)}, {}, "b_enc has shape [1, 48], expected a vector"),
        ("relu", {"W_enc": torch.zeros(16, 48)}, {}, "it is transposed"),
        ("relu", {"W_dec": torch.zeros(16, 48)}, {}, "it is transposed"),
        ("relu", {"W_enc": torch.zeros(48, 16, dtype=torch.int64)}, {}, "dtype I64"),
        ("relu", {"W_dec": torch.full((48, 16), torch.nan)}, {}, "not finite"),
        ("relu", {"log_thresholds": torch.zeros(48)}, {}, "not supported: log_thresholds"),
        ("relu_skip", {"W_skip": torch.zeros(16, 8)}, {}, "W_skip has shape [16, 8], expected [16, 16]"),
        ("jumprelu", {"activation_function.threshold": torch.zeros(47)}, {}, "threshold has shape [47], expected [48]"),
        ("relu", {}, {"feature_input_hook": None}, "?hook="),
        ("relu", {}, {"feature_output_hook": None}, "?hook_out="),
        ("relu", {}, {"feature_input_hook": ["mlp.hook_in"]}, "feature_input_hook must be the name"),
        ("relu", {}, {"feature_input_hook": "somewhere"}, "blocks.0.somewhere"),
        ("cross_layer_relu", {"b_enc_0": None}, {}, "tensor b_enc_0 is missing"),
        ("cross_layer_relu", {"W_enc_0": torch.zeros(16, 48)}, {}, "it is transposed"),
        ("cross_layer_relu", {"W_skip_0": torch.zeros(16, 16)}, {}, "not supported: W_skip_0"),
        ("cross_layer_jumprelu", {"threshold_0": torch.zeros(1, 48)}, {}, "threshold_0 has shape [1, 48]"),
    ],
)
def test_broken_checkpoints(copy, name, tensors, config, says):
    with pytest.raises(SAEFormatError) as caught:
        load(copy(name, 0, tensors, config))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("decoder", "says"),
    [
        ({"W_dec_0": torch.zeros(48, 16)}, "W_dec_0 has shape [48, 16], expected [48, 1, 16]"),
        ({"W_dec_0": torch.zeros(48, 3, 8)}, "W_dec_0 has shape [48, 3, 8], expected [48, 3, 16]"),
        ({"W_dec_0": None}, "W_dec_0 is missing"),
        ({"W_dec_0": torch.full((48, 3, 16), torch.nan)}, "not finite"),
    ],
)
def test_a_broken_decoder_of_a_cross_layer_transcoder(copy, decoder, says):
    with pytest.raises(SAEFormatError) as caught:
        load(copy("cross_layer_relu", 0, decoder, file="W_dec_0.safetensors"))
    assert says in str(caught.value)


def test_a_cross_layer_transcoder_without_its_decoder(copy):
    path = copy("cross_layer_relu", 0)
    path.with_name("W_dec_0.safetensors").unlink()
    with pytest.raises(SAEFormatError, match=r"W_dec_0\.safetensors"):
        load(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not YAML"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
        ("- a", "not a configuration"),
        ("[" * 10_000, "not YAML"),
    ],
)
def test_a_configuration_that_is_none(copy, text, says):
    path = copy("relu")
    (path.parent / "config.yaml").write_text(text)
    with pytest.raises(SAEFormatError, match=says):
        load(path)


def test_k_is_more_than_there_are():
    with pytest.raises(SAEFormatError, match="k=49 is larger"):
        load(f"{case('topk', 0)[0]}?k=49")


@pytest.mark.parametrize(("name", "layer"), SETS + CROSS_LAYER)
def test_converted_it_gives_the_same(name, layer, tmp_path):
    path, answers = case(name, layer)
    sae = load(path)
    save_saelens(sae, tmp_path / "converted")
    converted = load(tmp_path / "converted")
    assert_close(converted.encode(answers.x), sae.encode(answers.x))
    assert_close(converted.decode(answers.activations, answers.x), answers.tensors["reconstruction"])
    assert (converted.hook_points, converted.hook_points_out) == (sae.hook_points, sae.hook_points_out)
