"""SAELens checkpoints: the maths of every architecture, and every way a folder can be wrong."""

import json
import struct

import pytest
import torch
from safetensors import safe_open

from sae_models import SAEFormatError, load
from tests.sae_models.build import build_sae


def encode(folder, x):
    """Feature activations by SAELens' definitions (sae_lens/saes/{standard,jumprelu,topk}_sae.py), float64."""
    config = json.loads((folder / "cfg.json").read_text())
    with safe_open(folder / "sae_weights.safetensors", framework="pt") as file:
        w = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
    sae_in = x.double() - (w["b_dec"] if config["apply_b_dec_to_input"] else 0.0)
    pre = sae_in @ w["W_enc"] + w["b_enc"]
    if config["architecture"] == "standard":
        return pre.relu()
    if config["architecture"] == "jumprelu":
        return pre.relu() * (pre > w["threshold"])
    if config["rescale_acts_by_decoder_norm"]:
        pre = pre * w["W_dec"].norm(dim=-1)
    top = pre.topk(config["k"], dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def decoder_direction(folder, feature):
    config = json.loads((folder / "cfg.json").read_text())
    with safe_open(folder / "sae_weights.safetensors", framework="pt") as file:
        row = file.get_tensor("W_dec")[feature].double()
    return row / row.norm() if config.get("rescale_acts_by_decoder_norm") else row


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("standard", {}),
        ("jumprelu", {}),
        ("topk", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
)
def test_rows_give_the_published_activations(tmp_path, architecture, config, apply_b_dec):
    wide = {"W_dec": torch.randn(24, 8) * torch.linspace(0.2, 3, 24)[:, None]}
    folder = build_sae(tmp_path / "s", architecture, tensors=wide, cfg={"apply_b_dec_to_input": apply_b_dec, **config})
    sae = load(folder)
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    expected = encode(folder, x)
    W_enc, b_enc = sae.encoder()
    all_pre = x @ W_enc + b_enc
    for feature in range(sae.d_sae):
        rows = sae.rows(feature)
        pre = x @ rows.encoder + rows.bias
        assert torch.allclose(pre, all_pre[:, feature], atol=1e-5)
        f = torch.where(pre > rows.threshold, pre, 0.0)
        if sae.k is not None:
            f = f * (all_pre >= all_pre.topk(sae.k).values[:, -1:])[:, feature]
        assert torch.allclose(f.double(), expected[:, feature], atol=1e-5)
        assert torch.allclose(rows.decoder.double(), decoder_direction(folder, feature), atol=1e-6)


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
    assert (sae.name, sae.hook_point.layer, str(sae.hook_point), sae.skip_first) == (
        "m/l6",
        6,
        "blocks.6.hook_resid_post",
        1,
    )


def test_the_hash_covers_weights_and_configuration(tmp_path):
    same = [load(build_sae(tmp_path / name)).sha256 for name in ("a", "b")]
    other_weights = load(build_sae(tmp_path / "c", seed=1)).sha256
    other_config = load(build_sae(tmp_path / "d", cfg={"apply_b_dec_to_input": False})).sha256
    assert same[0] == same[1]
    assert len({same[0], other_weights, other_config}) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "gated"}, "architecture='gated' is not supported"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' is not supported"),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({"d_sae": 25}, "W_enc has shape [8, 24], cfg.json asks for [8, 25]"),
        ({"d_in": 0}, "d_in must be a positive integer"),
        ({"metadata": {}}, "no metadata.hook_name"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_z"}}, "blocks.1.attn.hook_z"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "before the first decoder layer"),
        ({"tensors": {"W_enc": torch.full((8, 24), float("nan"))}}, "W_enc holds values that are not finite"),
        ({"tensors": {"W_dec": torch.zeros(24, 8, dtype=torch.int32)}}, "dtype I32"),
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
    with pytest.raises(SAEFormatError, match="no such folder"):
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
