"""encode_topk_screened returns what encode_topk returns, whether its screen was enough or not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_kernels.eight_bit import quantise
from steer_kernels.encode_topk import encode_topk_reference
from steer_kernels.encode_topk_screened import encode_topk_screened
from tests.kernels.conftest import INTERPRETED
from tests.kernels.sae_cases import DRAWN, DTYPES, encode_topk, encoder, place, real_encoder, same, shapes

EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
INF = float("inf")


def screened(device, x, W, b, k, absolute=False, scale=None, dtype=torch.int8):
    """(values, features) of the op, or of what it launches on a GPU."""
    x, W, b, scale = place(device, x, W, b, scale)
    copy = quantise(W, dtype)
    if device == "interpreter":
        from steer_kernels.encode_topk_screened.triton_kernel import encode_topk_screened_triton

        got = encode_topk_screened_triton(x, W, b, copy, k, absolute, scale)
        return got.values, got.features
    tensors = (copy.weights, copy.step, copy.slack, copy.longest)
    return [t.cpu() for t in encode_topk_screened(x, W, b, *tensors, k, absolute, scale)]


def assert_same_as_unscreened(device, x, W, b, k, absolute=False, scale=None, dtype=torch.int8):
    values, features = screened(device, x, W, b, k, absolute, scale, dtype)
    expected_values, expected_features = encode_topk(device, x, W, b, k, absolute, scale)
    same(features, expected_features)
    same(values, expected_values)


def launch(triton_device, x, W, b, k, **more):
    """What the launcher says of its screen, and the same without one, all on the CPU."""
    from steer_kernels.encode_topk.triton_kernel import encode_topk_triton
    from steer_kernels.encode_topk_screened.triton_kernel import encode_topk_screened_triton

    x, W, b = (t.to(triton_device) for t in (x, W, b))
    absolute = more.pop("absolute", False)
    got = encode_topk_screened_triton(x, W, b, quantise(W, more.pop("dtype", torch.int8)), k, absolute, **more)
    plain = encode_topk_triton(x, W, b, k, absolute)
    same(got.features.cpu(), plain.features.cpu())
    same(got.values.cpu(), plain.values.cpu())
    return got.candidates.cpu(), got.uncertain.cpu()


def sparse_tokens(tokens, d_in, d_sae, dtype, per_token=4):
    """(x, W, b) where few features stand out, as they do in an SAE: x is a sum of a few rows of the encoder."""
    _, W, b, _ = real_encoder(1, d_in, d_sae, dtype)
    generator = torch.Generator().manual_seed(1)
    rows = torch.stack([torch.randperm(d_sae, generator=generator)[:per_token] for _ in range(tokens)])
    strengths = torch.arange(per_token, 0, -1).add(2.0)
    return torch.einsum("n,tnd->td", strengths, W.float()[rows]).to(dtype), W, b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absolute", [False, True])
def test_real_numbers(device, dtype, absolute):
    tokens, d_sae, k = (2, 300, 7) if INTERPRETED else (40, 5000, 32)
    x, W, b, scale = real_encoder(tokens, 70, d_sae, dtype)
    assert_same_as_unscreened(device, x, W, b, k, absolute, scale)


@DRAWN
@given(shapes(), st.sampled_from(DTYPES), st.sampled_from(EIGHT_BITS), st.booleans(), st.data())
def test_drawn_ties(device, shape, dtype, eight_bits, absolute, data):
    """Small integers tie and int8 does not hold them exactly: screens fail, and the oracle is met to the bit."""
    if device == "cuda" and eight_bits != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        eight_bits = torch.int8
    tokens, d_in, d_sae, seed = shape
    x, W, b, scale = encoder(tokens, d_in, d_sae, dtype, seed, bound=data.draw(st.integers(0, 3)))
    k, scale = data.draw(st.integers(1, min(d_sae, 40))), data.draw(st.sampled_from([None, scale]))
    values, features = screened(device, x, W, b, k, absolute, scale, eight_bits)
    expected_values, expected_features = encode_topk_reference(x, W, b, k, absolute, scale)
    same(features, expected_features)
    same(values, expected_values)


def test_nan_and_infinity(device):
    x, W, b, _ = encoder(5, 9, 200, torch.float32)
    x[1, 2], x[2, 0] = float("nan"), INF
    W[7, 3], W[30, 1] = INF, float("nan")
    b[17], b[18], b[19] = float("nan"), INF, -INF
    for absolute in (False, True):
        assert_same_as_unscreened(device, x, W, b, 12, absolute)


def test_no_tokens(device):
    values, features = screened(device, torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(9), 3)
    assert values.shape == features.shape == (0, 3)


@pytest.mark.parametrize("eight_bits", EIGHT_BITS)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_screen_is_enough_where_features_stand_out(triton_device, absolute, eight_bits):
    x, W, b = sparse_tokens(3, 64, 700, torch.bfloat16)
    if absolute:
        x[1] *= -1
    candidates, uncertain = launch(triton_device, x, W, b, 4, absolute=absolute, dtype=eight_bits)
    assert not bool(uncertain.any())
    assert bool((candidates < 40).all())


def test_ties_nearer_than_the_bound_read_the_encoder(triton_device):
    """Equal rows: every feature's ends are the same, so no candidate is surely ahead of what was dropped."""
    x, W, b = torch.ones(2, 5), torch.ones(150, 5), torch.zeros(150)
    x[1] = 0.0
    _, uncertain = launch(triton_device, x, W, b, 10, capacity=20)
    assert uncertain.tolist() == [1, 1]
    candidates, uncertain = launch(triton_device, x, W, b, 10, capacity=150, slots=128)
    assert candidates.tolist() == [150, 150]
    assert uncertain.tolist() == [0, 0]


def test_a_near_tie_is_decided_by_the_encoder(triton_device):
    """Two rows that eight bits cannot tell apart, the second a little larger, at the border of the k."""
    x, W, b = sparse_tokens(1, 64, 400, torch.float32)
    own = x / x.norm()
    W[100], W[200] = own * 20, own * 20.001
    copy = quantise(W)
    assert bool((copy.weights[100] == copy.weights[200]).all())
    _, uncertain = launch(triton_device, x, W, b, 1)
    assert uncertain.tolist() == [0]
    _, uncertain = launch(triton_device, x, W, b, 1, capacity=1)
    assert uncertain.tolist() == [1]


@pytest.mark.parametrize("slots", [2, 3])
def test_full_tiles_are_noticed(triton_device, slots):
    """All that stands out stands in one of three tiles, which keeps fewer than k of it; together they keep enough."""
    x, W, b = sparse_tokens(2, 32, 300, torch.float32)
    b[130:150] = 100.0 + torch.arange(20)
    _, uncertain = launch(triton_device, x, W, b, 5, slots=slots)
    assert uncertain.tolist() == [1, 1]
    _, uncertain = launch(triton_device, x, W, b, 5, slots=128)
    assert uncertain.tolist() == [0, 0]


def test_certain_and_uncertain_tokens_in_two_tiles(triton_device):
    """Of 33 float32 tokens in tiles of 32, one in each needs the encoder; the others keep what the screen found."""
    x, W, b = sparse_tokens(33, 16, 150, torch.float32)
    W[0] *= 3
    W[100] = W[101] = W[0]
    x[5] = x[32] = W[0] * 5
    _, uncertain = launch(triton_device, x, W, b, 1, capacity=2)
    assert uncertain[5] == uncertain[32] == 1
    assert int(uncertain.sum()) < 33


def test_magnitudes_far_apart(triton_device):
    """A token of 1e30 beside one of 1e-30, and rows as far apart."""
    x, W, b = sparse_tokens(3, 32, 200, torch.float32)
    x[0] *= 1e30
    x[1] *= 1e-30
    W[:50] *= 1e6
    W[50:100] *= 1e-6
    launch(triton_device, x, W, torch.zeros_like(b), 5)


def test_worth_screening():
    from steer_kernels.encode_topk_screened.triton_kernel import worth_screening

    assert worth_screening(1, 16_384, 64)
    assert worth_screening(32, 131_072, 64)
    assert not worth_screening(65, 131_072, 64), "each token reads its own candidates"
    assert not worth_screening(1, 512, 64), "there are hardly more features than candidates"
    assert not worth_screening(1, 131_072, 512)
