"""The bound on what eight bits change, against float64 and against sums in float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_kernels.eight_bit import (
    BIAS_SLACK,
    UNDERFLOW,
    EightBitEncoder,
    check_eight_bit,
    eight_bit_reference,
    quantise,
    token_sizes,
)
from steer_kernels.pre_activations import pre_activations_reference
from tests.kernels.sae_cases import DRAWN, DTYPES, real_encoder

EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
INF = float("inf")


def in_float32(x, encoder, b_enc, scale, step=None):
    """p as one of the many orders of float32 sums has it: one product after the other, in the order of d_in."""
    total = torch.zeros(x.shape[0], encoder.shape[0])
    for i in range(x.shape[1]):
        total += x[:, i : i + 1].float() * encoder[:, i].float()
    if step is not None:
        total *= step
    return (total if scale is None else total * scale.unsqueeze(-1)) + b_enc


def assert_bounded(x, W, b, scale, dtype):
    copy = quantise(W, dtype)
    p8, bound = eight_bit_reference(x, copy, b, scale)
    finite = bound.isfinite()
    assert bool(((p8 - pre_activations_reference(x, W, b, scale)).abs() <= bound)[finite].all())
    sums = in_float32(x, copy.weights, b, scale, copy.step) - in_float32(x, W, b, scale)
    assert bool((sums.double().abs() <= bound)[finite].all())
    return finite


@pytest.mark.parametrize("eight_bits", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_in", [1, 31, 500])
def test_normal_numbers(d_in, dtype, eight_bits):
    x, W, b, scale = real_encoder(9, d_in, 120, dtype)
    for one in (None, scale):
        assert bool(assert_bounded(x, W, b, one, eight_bits).all())


@DRAWN
@given(st.integers(1, 60), st.integers(0, 2**31), st.floats(-38, 30), st.floats(-38, 30), st.sampled_from(EIGHT_BITS))
def test_any_magnitudes(d_in, seed, of_x, of_W, eight_bits):
    """Each number with a power of ten of its own: subnormal ones, and products that underflow."""
    generator = torch.Generator().manual_seed(seed)

    def wild(power, *shape):
        spread = torch.rand(*shape, generator=generator) * 8
        return torch.randn(*shape, generator=generator) * 10.0 ** (power + spread)

    x, W, b = wild(of_x, 3, d_in), wild(of_W, 20, d_in), wild(of_x + of_W, 20).clamp(-1e38, 1e38)
    assert_bounded(x, W, b, torch.rand(3, generator=generator) * 1e3, eight_bits)


@pytest.mark.parametrize("eight_bits", EIGHT_BITS)
def test_no_bound_where_sums_of_levels_could_overflow(eight_bits):
    """Small weights become large numbers of small steps, which are added up before they are multiplied by the step."""
    x = torch.tensor([1e36, 1e15]).unsqueeze(-1).expand(2, 16)
    finite = assert_bounded(x, torch.full((3, 16), 1e-2), torch.zeros(3), None, eight_bits)
    assert finite.tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("eight_bits", EIGHT_BITS)
def test_the_worst_token_reaches_the_bound(eight_bits):
    """x along what a row lost: Cauchy and Schwarz's inequality is an equality, so no smaller slack would do."""
    _, W, _, _ = real_encoder(1, 200, 50, torch.float32)
    copy = quantise(W, eight_bits)
    x = copy.weights.float() * copy.step.unsqueeze(-1) - W
    p8, bound = eight_bit_reference(x, copy, torch.zeros(50))
    lost = (p8 - pre_activations_reference(x, W, torch.zeros(50))).diagonal()
    assert bool((lost <= bound.diagonal()).all())
    assert bool((lost > 0.95 * bound.diagonal()).all())


def test_int8_loses_less_of_bell_shaped_rows():
    _, W, _, _ = real_encoder(1, 2304, 64, torch.float32)
    slack = {dtype: float(quantise(W, dtype).slack.mean()) for dtype in EIGHT_BITS}
    assert slack[torch.int8] < 0.4 * slack[torch.float8_e4m3fn]


@pytest.mark.parametrize("eight_bits", EIGHT_BITS)
def test_zeros_and_what_eight_bits_hold_are_exact(eight_bits):
    W = torch.tensor([[0.0, 0.0], [127.0, -64.0] if eight_bits == torch.int8 else [448.0, -224.0]])
    copy = quantise(W, eight_bits)
    torch.testing.assert_close(copy.weights.float() * copy.step.unsqueeze(-1), W, rtol=0, atol=0)
    assert bool((copy.slack < 1e-5 * W.norm()).all())


@pytest.mark.parametrize("bad", [INF, -INF, float("nan")])
def test_rows_that_are_not_finite_are_never_sure(bad):
    x, W, b, _ = real_encoder(3, 8, 10, torch.float32)
    W[4, 2] = bad
    _, bound = eight_bit_reference(x, quantise(W), b)
    assert bool(bound[:, 4].isinf().all())
    assert bool(bound[:, [0, 9]].isfinite().all())


@pytest.mark.parametrize("bad", [INF, float("nan"), 3e38])
def test_tokens_whose_sums_may_overflow_are_never_sure(bad):
    x, W, b, _ = real_encoder(3, 8, 10, torch.float32)
    x[1, 2] = bad
    copy = quantise(W * 1e3)
    assert token_sizes(x, copy, None).isinf().tolist() == [False, True, False]
    assert token_sizes(x, copy, torch.zeros(3)).isinf().tolist() == [False, True, False]
    assert bool(eight_bit_reference(x, copy, b)[1][1].isinf().all())


def test_bias_and_underflow_have_their_share():
    copy = quantise(torch.zeros(2, 3))
    _, bound = eight_bit_reference(torch.zeros(1, 3), copy, torch.tensor([0.0, 1e6]))
    assert float(bound[0, 0]) >= UNDERFLOW
    assert float(bound[0, 1]) >= BIAS_SLACK * 1e6


def test_errors_say_what_does_not_fit():
    _, W, _, _ = real_encoder(1, 8, 10, torch.float32)
    copy = quantise(W)
    with pytest.raises(ValueError, match=r"int8 or float8_e4m3fn, not torch.float8_e5m2"):
        quantise(W, torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"weights must be \[9, 8\] int8 .* not \[10, 8\] torch.int8: make them with"):
        check_eight_bit(copy, W[:9])
    with pytest.raises(ValueError, match=r"slack must be \[10\] float32, not \[10\] torch.float64"):
        check_eight_bit(EightBitEncoder(copy.weights, copy.step, copy.slack.double(), copy.longest), W)
