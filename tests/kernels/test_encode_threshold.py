"""encode_threshold against a comparison in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_kernels.encode_threshold import encode_threshold_all, encode_threshold_reference
from steer_kernels.pre_activations import pre_activations_reference
from tests.kernels.sae_cases import (
    DRAWN,
    DTYPES,
    TYPED_SHAPES,
    encode_threshold,
    encoder,
    real_encoder,
    rounding_bound,
    same,
    shapes,
)


def assert_exact(device, x, W, b, threshold, capacity, scale=None):
    got = encode_threshold(device, x, W, b, threshold, capacity, scale)
    for one, expected in zip(got, encode_threshold_reference(x, W, b, threshold, capacity, scale), strict=True):
        same(one, expected)


@pytest.mark.parametrize(("tokens", "d_in", "d_sae", "dtype"), TYPED_SHAPES)
def test_shapes(device, tokens, d_in, d_sae, dtype):
    x, W, b, scale = encoder(tokens, d_in, d_sae, dtype)
    # Integers against integers: many pre-activations equal their threshold, which is not above it.
    threshold = torch.arange(d_sae).remainder(5).float()
    assert_exact(device, x, W, b, threshold, d_sae)
    assert_exact(device, x, W, b, threshold, max(1, d_sae // 8), scale)


@DRAWN
@given(shapes(), st.sampled_from(DTYPES), st.data())
def test_drawn_inputs(device, shape, dtype, data):
    tokens, d_in, d_sae, seed = shape
    x, W, b, scale = encoder(tokens, d_in, d_sae, dtype, seed)
    threshold = torch.full((d_sae,), data.draw(st.sampled_from([-float("inf"), -3.0, 0.0, 8.0, float("inf")])))
    capacity = data.draw(st.integers(1, d_sae + 5))
    assert_exact(device, x, W, b, threshold, capacity, data.draw(st.sampled_from([None, scale])))


@pytest.mark.parametrize("capacity", [1, 127, 128, 129, 300, 400])
def test_overflow_is_counted_and_keeps_the_lowest(device, capacity):
    x, W, b = torch.ones(3, 5), torch.ones(300, 5), torch.zeros(300)
    values, features, counts = encode_threshold(device, x, W, b, torch.zeros(300), capacity)
    held = min(capacity, 300)
    assert counts.tolist() == [300] * 3
    same(features[:, :held], torch.arange(held).expand(3, held))
    same(values[:, :held], torch.full((3, held), 5.0))
    assert bool((features[:, held:] == -1).all())
    assert bool((values[:, held:] == 0).all())


def test_nan_is_not_active_and_infinity_is(device):
    x, W, b, _ = encoder(5, 9, 200, torch.float32)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    assert_exact(device, x, W, b, torch.zeros(200), 200)
    assert encode_threshold(device, x, W, b, torch.zeros(200), 200)[2][1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_numbers(device, dtype):
    """Within the rounding of float32 sums: what is clearly above is found, what is clearly below is not."""
    tokens, d_sae = (5, 700) if device == "interpreter" else (70, 5000)
    x, W, b, scale = real_encoder(tokens, 192, d_sae, dtype)
    threshold = torch.full((d_sae,), 1.5)
    values, features, counts = encode_threshold(device, x, W, b, threshold, d_sae, scale)
    pre_acts, bound = pre_activations_reference(x, W, b, scale), rounding_bound(x, W, b, scale)
    active = torch.zeros(tokens, d_sae + 1, dtype=torch.bool).scatter_(1, features % (d_sae + 1), True)[:, :d_sae]
    assert bool(active[pre_acts > 1.5 + bound].all())
    assert not bool(active[pre_acts <= 1.5 - bound].any())
    assert active.sum(-1).tolist() == counts.tolist()
    found = features >= 0
    errors = (values - pre_acts.gather(-1, features.clamp(min=0))).abs()
    assert bool((errors <= bound)[found].all())


def test_gated_saes_are_thresholds(device):
    """The gate of Rajamanoharan et al. 2024 opens exactly above the threshold of the package's docstring."""
    x, W, b_gate, _ = encoder(12, 20, 300, torch.float32)
    r_mag, b_mag = torch.full((300,), 2.0).log(), torch.arange(300).remainder(7).float() - 3
    gate = x.double() @ W.double().T + b_gate.double()
    magnitude = 2.0 * (x.double() @ W.double().T) + b_mag.double()
    expected = torch.where(gate > 0, magnitude.relu(), 0.0)
    threshold = (b_mag - r_mag.exp() * b_gate).clamp(min=0)
    values, features, _ = encode_threshold(device, x, W * 2.0, b_mag, threshold, 300)
    dense = torch.zeros(12, 301, dtype=torch.float64).scatter_(1, features % 301, values.double())[:, :300]
    same(dense, expected)


@pytest.mark.parametrize("slots", [1, 3, 20, 128])
@pytest.mark.parametrize("capacity", [10, 45, 500])
def test_full_tiles_are_run_again(triton_device, slots, capacity):
    from steer_kernels.encode_threshold.triton_kernel import encode_threshold_triton

    x, W, b, _ = encoder(5, 33, 500, torch.float32)
    b[130:150] = 1000.0
    threshold = torch.full((500,), 20.0)
    encoded = encode_threshold_triton(*[t.to(triton_device) for t in (x, W, b, threshold)], capacity, slots=slots)
    values, features, counts = encode_threshold_reference(x, W, b, threshold, capacity)
    same(encoded.features.cpu(), features)
    same(encoded.values.cpu(), values)
    same(encoded.counts.cpu(), counts)
    assert bool((encoded.full_tiles > 0).any()) == (slots < 128)


def test_batches_longer_than_a_pass(triton_device, monkeypatch):
    from steer_kernels.encode_threshold import triton_kernel

    monkeypatch.setattr(triton_kernel, "MAX_TOKENS", 16)
    x, W, b, _ = encoder(21, 6, 140, torch.float32)
    tensors = [t.to(triton_device) for t in (x, W, b, torch.zeros(140))]
    encoded = triton_kernel.encode_threshold_triton(*tensors, 50)
    same(encoded.features.cpu(), encode_threshold_reference(x, W, b, torch.zeros(140), 50)[1])


def test_rows_that_overflow_are_run_again():
    x, W, b, scale = encoder(9, 17, 200, torch.float32)
    threshold = torch.full((200,), 10.0)
    counts = encode_threshold_reference(x, W, b, threshold, 1, scale)[2]
    capacity = int(counts.float().median())
    assert int(counts.min()) <= capacity < int(counts.max())
    got = encode_threshold_all(x, W, b, threshold, capacity, scale)
    expected = encode_threshold_reference(x, W, b, threshold, int(counts.max()), scale)
    for one, other in zip(got, expected, strict=True):
        same(one, other)
