"""Our writer and our loader of SAELens checkpoints: every architecture comes back as it was."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from sae_models import SAE, HookPoint, SAEFormatError, load
from sae_models.architectures import ENCODERS
from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import scaled, whitening
from sae_models.sae import SkipMatrix, Weights
from sae_models.saelens_writer import save_saelens
from sae_models.tensor_source import LoadedTensors
from tests.sae_models.conformance import assert_close

D_IN, D_OUT, D_SAE = 8, 6, 24
SETTINGS = {
    "relu": {},
    "gated": {},
    "jumprelu": {},
    "prolu": {},
    "topk": {"k": 4},
    "abstopk": {"k": 4},
    "batchtopk": {"threshold": 0.4},
    "matryoshka": {"threshold": 0.2, "group_sizes": [6, 6, 12], "active_groups": 2},
    "groupmax": {"k": 6},
    "hierarchical_topk": {"k": 4},
    "switch": {"k": 3, "experts": 4},
}


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(tmp_path, architecture, writes_elsewhere=False, **weights):
    module = ENCODERS[architecture]
    parameters = {name: random(D_SAE, seed=i) * 0.3 for i, name in enumerate(module.PARAMETERS)}
    d_out = D_OUT if writes_elsewhere else D_IN
    source = LoadedTensors(tmp_path, {"e": random(D_IN, D_SAE, seed=10), "d": random(D_SAE, d_out, seed=11)})
    if architecture == "switch":
        weights["router"] = (random(D_IN, 4, seed=12).double(), random(4, seed=13).double())
    reads = (HookPoint(3, "mlp_in"),) if writes_elsewhere else (HookPoint(2), HookPoint(3))
    return SAE(
        name="some/sae",
        family="test",
        architecture=architecture,
        d_in=D_IN,
        d_out=d_out,
        d_sae=D_SAE,
        hook_points=reads,
        hook_points_out=(HookPoint(3, "mlp_out"),) if writes_elsewhere else reads,
        token_norm="none",
        model_name="org/model",
        skip_first=2,
        folder=tmp_path,
        sha256="0" * 64,
        weights=Weights(
            W_enc=FeatureMatrix(source, "e", 1, "0"),
            W_dec=FeatureMatrix(source, "d", 0, "0"),
            b_dec=random(d_out, seed=14).double(),
            activation=module.canonical(**parameters, **SETTINGS[architecture]),
            **weights,
        ),
    )


def assert_same(again, sae):
    x = random(64, D_IN, seed=20)
    acts = sae.encode(x)
    assert int((acts != 0).any(dim=1).sum()) > 60
    assert torch.equal(again.encode(x) != 0, acts != 0)
    assert_close(again.encode(x), acts)
    assert_close(again.decode(acts, x), sae.decode(acts, x))
    for name in ("name", "d_in", "d_out", "d_sae", "hook_points", "hook_points_out", "token_norm", "model_name"):
        assert getattr(again, name) == getattr(sae, name)
    assert (again.skip_first, again.selection) == (2, sae.selection)


def test_every_architecture_is_covered():
    assert SETTINGS.keys() == ENCODERS.keys()


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("architecture", SETTINGS)
def test_round_trip(tmp_path, architecture, norm):
    sae = replace(build(tmp_path, architecture), token_norm=norm)
    told = []
    save_saelens(sae, tmp_path / "out", progress=lambda done, of: told.append((done, of)))
    assert_same(load(tmp_path / "out"), sae)
    assert told == [(D_SAE, D_SAE)]


def test_folded_maps_come_back_folded(tmp_path):
    b_dec = random(D_IN, seed=14).double()
    basis = torch.linalg.qr(random(D_IN, D_IN, seed=15).double()).Q * torch.linspace(0.5, 2, D_IN).double()
    for number, (into, out_of) in enumerate(
        ((scaled(0.25), scaled(4.0)), whitening(random(D_IN, seed=16), basis, torch.linalg.inv(basis)))
    ):
        sae = build(tmp_path, "jumprelu", input_map=into.then_subtract(b_dec), output_map=out_of)
        save_saelens(sae, tmp_path / f"out{number}")
        assert_same(load(tmp_path / f"out{number}"), sae)


@pytest.mark.parametrize("rescale", ["topk", "abstopk"])
def test_rescaled_by_decoder_norm(tmp_path, rescale):
    sae = build(tmp_path, rescale)
    activation = replace(sae.weights.activation, rescale_by_decoder_norm=True)
    sae = replace(sae, weights=replace(sae.weights, activation=activation))
    save_saelens(sae, tmp_path / "out")
    assert_same(load(tmp_path / "out"), sae)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated", "batchtopk", "topk"])
def test_transcoders(tmp_path, architecture, skips):
    matrix = SkipMatrix(LoadedTensors(tmp_path, {"s": random(D_OUT, D_IN, seed=17)}), "s")
    skip = {"W_skip": matrix} if skips else {}
    sae = build(tmp_path, architecture, writes_elsewhere=True, **skip)
    save_saelens(sae, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.is_transcoder
    assert_same(again, sae)


def test_what_has_no_place_in_the_format_is_refused(tmp_path):
    for architecture in ("switch", "groupmax", "abstopk"):
        with pytest.raises(SAEFormatError, match=f"a {architecture} transcoder cannot be written"):
            save_saelens(build(tmp_path, architecture, writes_elsewhere=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_what_rounding_makes_of_it(tmp_path, dtype):
    sae = build(tmp_path, "matryoshka")
    save_saelens(sae, tmp_path / "out", dtype)
    with safe_open(tmp_path / "out" / "sae_weights.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert torch.equal(stored["W_enc"], sae.encoder()[0].to(dtype))
    assert torch.equal(stored["W_dec"], sae.decoder().to(dtype))
    assert float(stored["threshold"].max()) == torch.finfo(dtype).max
    assert json.loads((tmp_path / "out" / "cfg.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert load(tmp_path / "out").encode(random(64, D_IN, seed=20))[:, 12:].abs().max() == 0


def test_many_blocks_are_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_models.sae.FEATURES_AT_ONCE", 7)
    sae = build(tmp_path, "topk")
    told = []
    save_saelens(sae, tmp_path / "out", progress=lambda done, of: told.append((done, of)))
    assert told == [(7, 24), (14, 24), (21, 24), (24, 24)]
    monkeypatch.undo()
    assert_same(load(tmp_path / "out"), sae)
