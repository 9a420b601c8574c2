"""Qwen-Scope: the model cards' layout and equations."""

import pytest
import torch

from sae_models import HookPoint, Selection
from tests.sae_models.conformance import assert_close, assert_conforms, cases
from tests.sae_models.pickles import (
    assert_a_server_refuses,
    assert_every_damage_is_named,
    damaged,
    load_pickled,
    refusal,
)

CASES = cases("qwen_scope")
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


def case(name):
    return next(parameter.values[0] for parameter in CASES if parameter.id == name)


@pytest.mark.parametrize("expected", CASES)
def test_it_does_what_the_cards_say(expected):
    sae = load_pickled(expected.checkpoint)
    assert_conforms(sae, expected)
    assert_close(sae.encode(expected.x)[expected.clear], expected.tensors["saelens_activations"][expected.clear])
    assert (sae.architecture, sae.selection, sae.token_norm) == ("topk", Selection(3), "none")
    assert sae.model_name == "Qwen/Qwen3-1.7B-Base"
    assert sae.name == "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3/layer7"
    # The cards hook the output of model.layers[n].
    assert (sae.hook_points, sae.hook_points_out) == ((HookPoint(7),), (HookPoint(7),))


@pytest.mark.parametrize("expected", CASES)
def test_the_cards_negative_activations_are_zero_here(expected):
    """The cards' function has no ReLU: where fewer than k pre-activations are positive it keeps negative ones.

    SAELens has one, and features that are "active" below zero are no features to steer. Elsewhere all agree.
    """
    card = expected.tensors["card_activations"]
    negative = (card < 0).any(dim=1)
    assert bool(negative.any()) == (expected.name == "l0_3_few_active")
    ours = load_pickled(expected.checkpoint).encode(expected.x)
    assert_close(ours[expected.clear], card.clamp(min=0)[expected.clear])
    alike = expected.clear & ~negative
    assert_close(ours[alike], card[alike])


def test_k_is_in_the_folder_or_an_option(tmp_path):
    published = case("l0_3").checkpoint
    assert load_pickled(f"{published}?k=5").selection == Selection(5)
    copy = damaged(published, tmp_path, lambda state: None)
    assert "k is only in the name of Qwen-Scope's folders" in refusal(copy)
    assert "add ?k=50" in refusal(copy)
    elsewhere = load_pickled(f"{copy}?k=3&model=Qwen/Qwen3-1.7B-Base")
    assert (elsewhere.selection, elsewhere.model_name) == (Selection(3), "Qwen/Qwen3-1.7B-Base")
    assert "k=49 is larger than d_sae=48" in refusal(f"{copy}?k=49")
    cache = tmp_path / "models--Qwen--SAE-Res-Qwen3.5-27B-W80K-L0_7" / "snapshots" / "0a1b"
    cache.mkdir(parents=True)
    (cache / "layer0.sae.pt").symlink_to(published)
    cached = load_pickled(cache / "layer0.sae.pt")
    assert (cached.selection, cached.model_name, cached.hook_point) == (Selection(7), "Qwen/Qwen3.5-27B", HookPoint(0))
    assert cached.sha256 != load_pickled(published).sha256


def test_one_layer_of_a_folder_must_be_named(tmp_path):
    published = case("l0_3").checkpoint
    assert load_pickled(published.parent).sha256 == load_pickled(published).sha256
    for layer in (0, 1):
        (tmp_path / f"layer{layer}.sae.pt").write_bytes(published.read_bytes())
    assert "there are 2 SAEs in it; name one of: layer0.sae.pt, layer1.sae.pt" in refusal(f"{tmp_path}?k=3")


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    release = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"
    assert_every_damage_is_named(case("l0_3").checkpoint, TENSORS, release)
    swapped = damaged(case("l0_3").checkpoint, release, lambda s: s.update({n: s[n].T for n in ("W_enc", "W_dec")}))
    assert "W_enc has shape [16, 48], expected [48, 16] (it is transposed)" in refusal(swapped)
    assert "option norm=2.0 has no use" in refusal(f"{case('l0_3').checkpoint}?norm=2")


def test_a_server_refuses_it():
    assert_a_server_refuses(case("l0_3").checkpoint)


def test_half_precision(tmp_path):
    release = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"
    release.mkdir()
    published = case("l0_3").checkpoint
    half = damaged(published, release, lambda s: s.update({n: t.bfloat16() for n, t in s.items()}))
    rows, exact = load_pickled(half).rows(9), load_pickled(published).rows(9)
    assert rows.encoder.dtype == torch.float32
    assert torch.equal(rows.encoder, exact.encoder.bfloat16().float())
