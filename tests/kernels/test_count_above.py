"""count_above against ranks in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_kernels.count_above import count_above_reference
from tests.kernels.sae_cases import (
    DRAWN,
    DTYPES,
    TYPED_SHAPES,
    count_above,
    encode_topk,
    encoder,
    real_encoder,
    same,
    shapes,
)

INF = float("inf")


def given_features(tokens, d_sae, n, seed=0):
    """[tokens, n], a fifth of them -1, and a token that asks for nothing."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(0, d_sae, (tokens, n), generator=generator)
    features[torch.rand(tokens, n, generator=generator) < 0.2] = -1
    features[tokens // 2] = -1
    return features


def assert_exact(device, x, W, b, features, floor, absolute=False, scale=None):
    p, ahead = count_above(device, x, W, b, features, floor, absolute, scale)
    expected_p, expected_ahead = count_above_reference(x, W, b, features, floor, absolute, scale)
    same(p, expected_p)
    same(ahead, expected_ahead)


@pytest.mark.parametrize(("tokens", "d_in", "d_sae", "dtype"), TYPED_SHAPES)
@pytest.mark.parametrize("absolute", [False, True])
def test_shapes_and_ties(device, tokens, d_in, d_sae, dtype, absolute):
    x, W, b, scale = encoder(tokens, d_in, d_sae, dtype)
    assert_exact(device, x, W, b, given_features(tokens, d_sae, 3), 0.0, absolute)
    assert_exact(device, x, W, b, given_features(tokens, d_sae, 1), -INF, absolute, scale)


@DRAWN
@given(shapes(), st.sampled_from(DTYPES), st.booleans(), st.data())
def test_drawn_inputs(device, shape, dtype, absolute, data):
    tokens, d_in, d_sae, seed = shape
    x, W, b, scale = encoder(tokens, d_in, d_sae, dtype, seed)
    features = given_features(tokens, d_sae, data.draw(st.integers(1, 20)), seed)
    floor = data.draw(st.sampled_from([-INF, 0.0, 10.0, INF]))
    scale = data.draw(st.sampled_from([None, scale]))
    features = features.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    assert_exact(device, x, W, b, features, floor, absolute, scale)


def test_equal_rows_rank_by_feature(device):
    features = torch.tensor([[0, 5, 299], [-1, 128, 127]])
    _, ahead = count_above(device, torch.ones(2, 5), torch.ones(300, 5), torch.zeros(300), features, 0.0)
    assert ahead.tolist() == [[0, 5, 299], [300, 128, 127]]


@pytest.mark.parametrize("absolute", [False, True])
def test_nan_and_infinity(device, absolute):
    x, W, b, _ = encoder(6, 9, 200, torch.float32)
    x[1, 2], x[3, 0] = float("nan"), INF
    b[17] = float("nan")
    features = given_features(6, 200, 30)
    features[:, 0] = 17
    assert_exact(device, x, W, b, features, -INF, absolute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absolute", [False, True])
def test_membership_is_that_of_encode_topk(device, dtype, absolute):
    """On any numbers, to the bit: both kernels add up in one order, so they rank the same p."""
    tokens, d_sae, k = (6, 500, 20) if device == "interpreter" else (64, 3000, 32)
    x, W, b, scale = real_encoder(tokens, 100, d_sae, dtype)
    _, selected = encode_topk(device, x, W, b, k, absolute, scale)
    others = torch.randint(0, d_sae, (tokens, k), generator=torch.Generator().manual_seed(1))
    features = torch.cat([selected, others], dim=1)
    _, ahead = count_above(device, x, W, b, features, -INF, absolute, scale)
    same(ahead[:, :k], torch.arange(k).expand(tokens, k))
    member = (others.unsqueeze(-1) == selected.unsqueeze(1)).any(-1)
    same(ahead[:, k:] < k, member)


def test_nothing_to_rank_reads_no_encoder(triton_device):
    """Where no given feature exceeds the floor, the encoder is not even looked at: all but the given rows are NaN."""
    from steer_kernels.count_above.triton_kernel import count_above_triton

    x, W, b, _ = encoder(20, 9, 300, torch.float32)
    poisoned = torch.full_like(W, float("nan"))
    poisoned[[3, 4]] = W[[3, 4]]
    features = torch.tensor([[3, 4, -1]]).repeat(20, 1)
    p, ahead = count_above_triton(*[t.to(triton_device) for t in (x, poisoned, b, features)], 1e6)
    same(p.cpu(), count_above_reference(x, W, b, features, 1e6)[0])
    assert bool((ahead == 300).all())


def test_batches_longer_than_a_pass(triton_device, monkeypatch):
    from steer_kernels.count_above import triton_kernel

    monkeypatch.setattr(triton_kernel, "MAX_TOKENS", 16)
    x, W, b, _ = encoder(21, 6, 140, torch.float32)
    features = given_features(21, 140, 3)
    _, ahead = triton_kernel.count_above_triton(*[t.to(triton_device) for t in (x, W, b, features)], 0.0)
    same(ahead.cpu(), count_above_reference(x, W, b, features, 0.0)[1])


def test_too_many_features_are_an_error(triton_device):
    from steer_kernels.count_above.triton_kernel import count_above_triton

    x, W, b, _ = (t.to(triton_device) for t in encoder(1, 2, 3, torch.float32))
    with pytest.raises(ValueError, match="at most 128 a token, not 129"):
        count_above_triton(x, W, b, torch.zeros(1, 129, dtype=torch.int64, device=triton_device), 0.0)
