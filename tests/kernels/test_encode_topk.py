"""encode_topk against a full sort in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_kernels.encode_topk import encode_topk_reference
from steer_kernels.pre_activations import pre_activations_reference
from tests.kernels.sae_cases import (
    DRAWN,
    DTYPES,
    TYPED_SHAPES,
    encode_topk,
    encoder,
    real_encoder,
    rounding_bound,
    same,
    shapes,
)


def assert_exact(device, x, W, b, k, absolute=False, scale=None):
    values, features = encode_topk(device, x, W, b, k, absolute, scale)
    expected_values, expected_features = encode_topk_reference(x, W, b, k, absolute, scale)
    same(features, expected_features)
    same(values, expected_values)


@pytest.mark.parametrize(("tokens", "d_in", "d_sae", "dtype"), TYPED_SHAPES)
@pytest.mark.parametrize("absolute", [False, True])
def test_shapes_and_ties(device, tokens, d_in, d_sae, dtype, absolute):
    x, W, b, scale = encoder(tokens, d_in, d_sae, dtype)
    assert_exact(device, x, W, b, min(d_sae, 13), absolute)
    assert_exact(device, x, W, b, 1, absolute, scale)


@DRAWN
@given(shapes(), st.sampled_from(DTYPES), st.booleans(), st.data())
def test_drawn_inputs(device, shape, dtype, absolute, data):
    tokens, d_in, d_sae, seed = shape
    x, W, b, scale = encoder(tokens, d_in, d_sae, dtype, seed, bound=data.draw(st.integers(0, 3)))
    k = data.draw(st.integers(1, min(d_sae, 64)))
    assert_exact(device, x, W, b, k, absolute, data.draw(st.sampled_from([None, scale])))


@pytest.mark.parametrize("k", [1, 100, 300])
def test_equal_rows_go_to_the_lowest_features(device, k):
    x, W, b = torch.ones(3, 5), torch.ones(300, 5), torch.zeros(300)
    values, features = encode_topk(device, x, W, b, k)
    same(features, torch.arange(k).expand(3, k))
    same(values, torch.full((3, k), 5.0))


def test_signed_zeros_are_equal(device):
    W = torch.tensor([[-1.0], [1.0]]).repeat(100, 1)
    values, features = encode_topk(device, torch.tensor([[0.0], [-0.0]]), W, torch.full((200,), -0.0), 150)
    same(features, torch.arange(150).expand(2, 150))
    assert bool((values == 0).all())


@pytest.mark.parametrize("absolute", [False, True])
def test_nan_and_infinity_stay_in_their_tokens(device, absolute):
    x, W, b, _ = encoder(6, 9, 200, torch.float32)
    x[1, 2], x[3, 0], x[4, 5] = float("nan"), float("inf"), float("-inf")
    assert_exact(device, x, W, b, 40, absolute)
    assert bool(encode_topk(device, x, W, b, 40)[0][1].isnan().all())


def test_nan_ranks_after_minus_infinity(device):
    x, W = torch.ones(1, 1), torch.zeros(200, 1)
    b = torch.full((200,), float("nan"))
    b[7], b[150], b[160] = 1.0, float("-inf"), float("inf")
    values, features = encode_topk(device, x, W, b, 5)
    assert features.tolist() == [[160, 7, 150, 0, 1]]
    same(values[0, :3], torch.tensor([float("inf"), 1.0, float("-inf")]))
    assert bool(values[0, 3:].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absolute", [False, True])
def test_real_numbers(device, dtype, absolute):
    """Within the rounding of float32 sums: nothing kept is smaller than the oracle's last, but for that."""
    tokens, d_sae, k = (5, 700, 33) if device == "interpreter" else (70, 5000, 64)
    x, W, b, scale = real_encoder(tokens, 192, d_sae, dtype)
    values, features = encode_topk(device, x, W, b, k, absolute, scale)
    pre_acts, bound = pre_activations_reference(x, W, b, scale), rounding_bound(x, W, b, scale)
    assert bool(((values - pre_acts.gather(-1, features)).abs() <= bound).all())
    size = pre_acts.abs() if absolute else pre_acts
    last = size.sort(dim=-1, descending=True).values[:, k - 1 : k]
    assert bool((size.gather(-1, features) >= last - 2 * bound).all())
    assert all(len(set(row)) == k for row in features.tolist())
    kept = values.abs() if absolute else values
    assert bool((kept[:, 1:] <= kept[:, :-1]).all())


def test_rows_of_larger_tensors(device):
    """Views with strides, as slices of a batch and transposed matrices are."""
    x, W, b, _ = encoder(7, 24, 150, torch.float32)
    wide = torch.cat([x, x.new_full((7, 8), float("nan"))], dim=1)
    assert_exact(device, wide[2:6, :24], W, b, 9)
    assert_exact(device, x.T.contiguous().T, W, b, 9)
    assert_exact(device, x, W.T.contiguous().T, b, 9)


def test_no_tokens(device):
    values, features = encode_topk(device, torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(9), 3)
    assert values.shape == features.shape == (0, 3)


@pytest.mark.parametrize("slots", [1, 2, 5, 128])
@pytest.mark.parametrize("absolute", [False, True])
def test_full_tiles_are_run_again(triton_device, slots, absolute):
    """The largest of each token stand side by side in one tile, where only a second run finds them."""
    from steer_kernels.encode_topk.triton_kernel import encode_topk_triton

    x, W, b, _ = encoder(3, 33, 500, torch.float32)
    b[130:150] = 1000.0
    if absolute:
        b[135:140] = -1000.0
    tensors = [t.to(triton_device) for t in (x, W, b)]
    encoded = encode_topk_triton(*tensors, 30, absolute, slots=slots)
    values, features = encode_topk_reference(x, W, b, 30, absolute)
    same(encoded.features.cpu(), features)
    same(encoded.values.cpu(), values)
    # 20 of the 30 in one tile: that one is full unless it kept that many, and one that kept all is never.
    assert bool((encoded.full_tiles > 0).all()) == (slots < 20)
    assert bool((encoded.full_tiles <= max(1, 30 // slots)).all())


def test_tiles_that_keep_less_than_k_together(triton_device):
    from steer_kernels.encode_topk.triton_kernel import encode_topk_triton

    x, W, b, _ = encoder(3, 5, 129, torch.bfloat16)
    encoded = encode_topk_triton(*[t.to(triton_device) for t in (x, W, b)], 100, slots=3)
    same(encoded.features.cpu(), encode_topk_reference(x, W, b, 100)[1])


def test_batches_longer_than_a_pass(triton_device, monkeypatch):
    from steer_kernels.encode_topk import triton_kernel

    monkeypatch.setattr(triton_kernel, "MAX_TOKENS", 16)
    x, W, b, scale = encoder(21, 6, 140, torch.float32)
    x_there, W_there, b_there, scale_there = (t.to(triton_device) for t in (x, W, b, scale))
    encoded = triton_kernel.encode_topk_triton(x_there, W_there, b_there, 8, False, scale_there)
    same(encoded.features.cpu(), encode_topk_reference(x, W, b, 8, False, scale)[1])


def test_limits_are_errors(triton_device):
    from steer_kernels.encode_topk.triton_kernel import encode_topk_triton

    x, W, b = (t.to(triton_device) for t in (torch.zeros(1, 2), torch.zeros(1100, 2), torch.zeros(1100)))
    with pytest.raises(ValueError, match="k must be at most 1024"):
        encode_topk_triton(x, W, b, 1025)
