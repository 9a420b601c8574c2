"""SAELens checkpoints: the maths of every architecture, and every way a folder can be wrong."""

import re
import struct

import pytest
import torch

from sae_models import HookPoint, LoadOptions, SAEFormatError, Selection, load
from sae_models.saelens_writer import save_saelens
from tests.sae_models.build import build_sae
from tests.sae_models.conformance import assert_close, assert_conforms, cases


@pytest.mark.parametrize("expected", cases("sae_lens"))
def test_what_saelens_wrote_does_what_saelens_says(expected):
    sae = load(expected.checkpoint, needed_options(expected))
    assert_conforms(sae, expected)
    assert sae.model_name == "gpt2-small"
    if sae.is_transcoder:
        assert (sae.hook_points, sae.hook_points_out) == ((HookPoint(3, "ln2_normalized"),), (HookPoint(3, "mlp_out"),))
    else:
        # Version 3 names the stream before the layer.
        assert sae.hook_points == (HookPoint(2 if "pre" in expected.checkpoint.name else 3),)


def needed_options(expected):
    """The mean norm, for the checkpoints that are saved without a factor that they need."""
    if expected.name in ("average", "average_jumprelu", "legacy_average_boolean"):
        return LoadOptions(norm=expected.x.shape[1] ** 0.5 / float(expected.metadata["norm_scaling_factor"]))
    return None


@pytest.mark.parametrize("expected", cases("sae_lens", "refuse"))
def test_what_cannot_be_served_is_refused_with_the_reason(expected):
    says = {
        "temporal": "depend on earlier tokens",
        "temporal_published": "depend on earlier tokens",
        "matching_pursuit": "one after the other",
        "batchtopk_checkpoint": "architecture='batchtopk'",
        "legacy_finetuned": "finetuned scaling factors",
    }[expected.name]
    with pytest.raises(SAEFormatError, match=says):
        load(expected.checkpoint)


@pytest.mark.parametrize("name", ["average", "average_checkpoint", "legacy_average_boolean", "whitening_checkpoint"])
def test_saelens_itself_leaves_normalisation_out(name):
    """SAELens 6.54 reads these folders without a word and answers something else than what was trained.

    Its training objects, with the normalisation that they saw, give `activations`; its `load_from_disk` gives
    `saelens_activations`, of inputs that nobody scaled. Ours are the former, or an error that names the option.
    """
    (expected,) = (case.values[0] for case in cases("sae_lens") if case.id == name)
    ours = load(expected.checkpoint, needed_options(expected)).encode(expected.x)
    assert float((expected.tensors["saelens_activations"] - expected.tensors["activations"]).abs().max()) > 0.1
    assert_close(ours, expected.tensors["activations"])


def test_a_factor_that_is_missing_is_never_guessed(tmp_path):
    (expected,) = (case.values[0] for case in cases("sae_lens") if case.id == "average")
    with pytest.raises(SAEFormatError, match=r"add \?norm=N"):
        load(expected.checkpoint)
    whitened = build_sae(tmp_path / "s", cfg={"normalize_activations": "covariance_whitening"})
    with pytest.raises(SAEFormatError, match=r"activation_whitening.safetensors is missing"):
        load(whitened)


@pytest.mark.parametrize("expected", cases("sae_lens"))
def test_written_and_read_again_it_does_the_same(expected, tmp_path):
    sae = load(expected.checkpoint, needed_options(expected))
    save_saelens(sae, tmp_path / "out")
    again = load(tmp_path / "out")
    assert_conforms(again, expected)
    assert (again.hook_points, again.hook_points_out) == (sae.hook_points, sae.hook_points_out)


def test_options(tmp_path):
    folder = build_sae(tmp_path / "s", "topk", k=8)
    sae = load(f"{folder}?k=3&hook=model.layers.4.mlp&model=org/other")
    assert (sae.selection, sae.model_name) == (Selection(3), "org/other")
    assert sae.hook_points == (HookPoint(4, "mlp_out"),)
    assert sae.sha256 != load(folder).sha256
    group = load(f"{folder}?hook=blocks.1.hook_resid_post,blocks.2.hook_resid_post")
    assert group.hook_points == (HookPoint(1), HookPoint(2))
    for options, says in (
        ("k=99", "k=99 is larger than d_sae=24"),
        ("k=0", "k='0' must be a whole number of at least 1"),
        ("norm=nan", "norm='nan' must be a number over 0"),
        ("norm=3", "norm=3.0 has no use"),
        ("layer=3", "'layer' is not known; options: hook"),
        ("hook=nowhere", "hook point 'nowhere' is not known"),
        ("k=3&k=4", "given twice"),
    ):
        with pytest.raises(SAEFormatError, match=re.escape(says)):
            load(f"{folder}?{options}")


def test_a_threshold_below_zero_is_a_relu(tmp_path):
    folder = build_sae(tmp_path / "s", "jumprelu", tensors={"threshold": torch.full((24,), -1.0)})
    assert load(folder).rows(0).threshold == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(tmp_path, dtype):
    folder = build_sae(
        tmp_path / "s", tensors={"W_enc": torch.randn(8, 24).to(dtype), "W_dec": torch.randn(24, 8).to(dtype)}
    )
    assert load(folder).rows(3).encoder.dtype == torch.float32


def test_metadata(tmp_path):
    metadata = {
        "model_name": "org/Model",
        "hook_name": "blocks.7.hook_resid_pre",
        "steer_server": {"name": "m/l6", "skip_first": 1},
    }
    sae = load(build_sae(tmp_path / "s", cfg={"metadata": metadata}))
    assert (sae.name, str(sae.hook_point), sae.skip_first) == ("m/l6", "blocks.6.hook_resid_post", 1)


def test_the_hash_covers_weights_and_configuration(tmp_path):
    same = [load(build_sae(tmp_path / name)).sha256 for name in ("a", "b")]
    other_weights = load(build_sae(tmp_path / "c", seed=1)).sha256
    other_config = load(build_sae(tmp_path / "d", cfg={"apply_b_dec_to_input": False})).sha256
    assert same[0] == same[1]
    assert len({same[0], other_weights, other_config}) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "kron"}, "architecture='kron' is not supported"),
        ({"architecture": "crosscoder"}, "crosscoder SAEs are not supported: its features are read from several"),
        ({"normalize_activations": "rms"}, "normalize_activations='rms' is not supported"),
        ({"reshape_activations": "hook_q"}, "reshape_activations"),
        ({"d_sae": 25}, "W_enc has shape [8, 24], expected [8, 25]"),
        ({"tensors": {"W_enc": torch.zeros(24, 8)}}, "expected [8, 24] (it is transposed)"),
        ({"d_in": 0}, "d_in must be a positive integer"),
        ({"metadata": {}}, "do not say where it reads; add ?hook="),
        ({"metadata": {"hook_name": "blocks.1.hook_elsewhere"}}, "'blocks.1.hook_elsewhere' is not known"),
        ({"tensors": {"W_enc": torch.full((8, 24), float("nan"))}}, "W_enc holds values that are not finite"),
        ({"tensors": {"W_dec": torch.zeros(24, 8, dtype=torch.int32)}}, "dtype I32; supported: float64"),
        ({"architecture": "topk", "k": 99}, "k=99 is larger than d_sae=24"),
    ],
)
def test_broken_checkpoints(tmp_path, change, says):
    tensors = change.pop("tensors", None)
    folder = build_sae(tmp_path / "s", change.get("architecture", "standard"), tensors=tensors, cfg=change)
    with pytest.raises(SAEFormatError) as caught:
        load(folder)
    assert says in str(caught.value)


def test_jumprelu_without_thresholds(tmp_path):
    folder = build_sae(tmp_path / "s", "standard", cfg={"architecture": "jumprelu"})
    with pytest.raises(SAEFormatError, match="threshold is missing"):
        load(folder)


def test_files_that_are_not_what_they_say(tmp_path):
    with pytest.raises(SAEFormatError, match="no such file or folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SAEFormatError, match=r"SAELens \(cfg.json"):
        load(tmp_path / "empty")
    folder = build_sae(tmp_path / "s")
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", struct.pack("<Q", 10 * 2**30) + whole[8:], b"\x80\x04pickle"):
        weights.write_bytes(damaged)
        with pytest.raises(SAEFormatError, match="not a readable safetensors file"):
            load(folder)
    weights.write_bytes(whole)
    (folder / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(SAEFormatError, match="not JSON"):
        load(folder)
    (folder / "cfg.json").write_text(" " * (2 << 20))
    with pytest.raises(SAEFormatError, match="at most"):
        load(folder)
