"""decode_sparse against a sum in float64, and the reconstructions that it is made for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_kernels.decode_sparse import decode_sparse_reference
from tests.kernels.sae_cases import DRAWN, DTYPES, decode_sparse, encode_topk, encoder, real_encoder, same

SHAPES = [(1, 1, 1, 1), (3, 15, 7, 20), (2, 16, 128, 9), (5, 17, 129, 300), (9, 64, 257, 50)]


def lists(tokens, n, d_out, d_sae, dtype, seed=0):
    """(features, values, decoder, b_dec, scale, base) of small integers; a third of the features are padding."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    features = integers(0, d_sae - 1, tokens, n)
    features[torch.rand(tokens, n, generator=generator) < 0.3] = -1
    return (
        features,
        integers(-3, 3, tokens, n).float(),
        integers(-3, 3, d_sae, d_out).to(dtype),
        integers(-3, 3, d_out).float(),
        integers(1, 3, tokens).float(),
        integers(-3, 3, tokens, d_out).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n", "d_out", "d_sae"), SHAPES)
def test_shapes(device, tokens, n, d_out, d_sae, dtype):
    features, values, decoder, b_dec, scale, base = lists(tokens, n, d_out, d_sae, dtype)
    none = (None, None, None)
    for more in (none, (b_dec, None, None), (None, scale, None), (None, None, base), (b_dec, scale, base)):
        got = decode_sparse(device, features, values, decoder, *more)
        same(got, decode_sparse_reference(features, values, decoder, *more))


@DRAWN
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 300), st.integers(1, 50), st.data())
def test_drawn_inputs(device, tokens, n, d_out, d_sae, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    features, values, decoder, b_dec, scale, base = lists(
        tokens, n, d_out, d_sae, dtype, data.draw(st.integers(0, 2**31))
    )
    features = features.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    got = decode_sparse(device, features, values, decoder, b_dec, scale, base)
    same(got, decode_sparse_reference(features, values, decoder, b_dec, scale, base))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_real_numbers_are_rounded_once(device, dtype, out):
    tokens, n, d_out, d_sae = 9, 37, 200, 400
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-1, d_sae, (tokens, n), generator=generator)
    values = torch.randn(tokens, n, generator=generator)
    decoder = torch.randn(d_sae, d_out, generator=generator).to(dtype)
    b_dec, base = torch.randn(d_out, generator=generator), torch.randn(tokens, d_out, generator=generator).to(out)
    got = decode_sparse(device, features, values, decoder, b_dec, None, base, out)
    assert got.dtype == out
    expected = decode_sparse_reference(features, values, decoder, b_dec, None, base)
    sizes = decode_sparse_reference(features, values.abs(), decoder.abs(), b_dec.abs(), None, base.abs())
    tolerance = (n + 3) * 2.0**-24 * sizes + torch.finfo(out).eps * expected.abs()
    assert bool(((got.double() - expected).abs() <= tolerance).all())


def test_empty_lists_give_the_bias(device):
    features, b_dec = torch.full((2, 5), -1), torch.arange(3.0)
    nan = torch.full((2, 5), float("nan"))
    same(decode_sparse(device, features, nan, torch.zeros(4, 3), b_dec), b_dec.expand(2, 3))


def test_nan_and_infinity_stay_in_their_tokens(device):
    features, values, decoder, b_dec, scale, base = lists(4, 6, 20, 30, torch.float32)
    features[:, 0] = 3
    values[1, 0], values[2, 0] = float("nan"), float("inf")
    got = decode_sparse(device, features, values, decoder, b_dec, scale, base)
    same(got, decode_sparse_reference(features, values, decoder, b_dec, scale, base))
    assert bool(got[1].isnan().all())
    assert bool(got[[0, 3]].isfinite().all())


@pytest.mark.parametrize("keep_error", [True, False])
def test_splices(device, keep_error):
    """A feature is set in the SAE's own activations: h' = dec(f') + (h - dec(f)), or dec(f') alone."""
    h, W_enc, b_enc, _ = real_encoder(7, 40, 200, torch.float32)
    W_dec, b_dec = torch.randn(200, 40, generator=torch.Generator().manual_seed(2)), torch.arange(40) / 40
    pre, features = encode_topk(device, h, W_enc, b_enc, 12)
    f = pre.relu()
    edited = f.clone()
    edited[:, 3] = 9.0

    def dense(activations):
        whole = torch.zeros(7, 200, dtype=torch.float64).scatter_(1, features, activations.double())
        return whole @ W_dec.double() + b_dec.double()

    if keep_error:
        expected = dense(edited) + (h.double() - dense(f))
        got = decode_sparse(device, features, edited - f, W_dec, base=h)
    else:
        expected = dense(edited)
        got = decode_sparse(device, features, edited, W_dec, b_dec)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_skip_transcoders(device):
    x, W_enc, b_enc, _ = encoder(5, 24, 90, torch.float32)
    W_dec, W_skip, b_dec = W_enc[:, :11].contiguous(), W_enc[:11], b_enc[:11]
    pre, features = encode_topk(device, x, W_enc, b_enc, 8)
    got = decode_sparse(device, features, pre.relu(), W_dec, b_dec, None, x @ W_skip.T)
    whole = torch.zeros(5, 90, dtype=torch.float64).scatter_(1, features, pre.relu().double())
    same(got, whole @ W_dec.double() + b_dec.double() + x.double() @ W_skip.double().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_baseline_of_the_benchmark_computes_the_same(triton_device, dtype):
    from benchmarks.kernels.plain_decode import plain_decode

    features, values, decoder, b_dec, _, _ = lists(5, 17, 129, 300, dtype)
    features = features.clamp(min=0)
    got = plain_decode(*(t.to(triton_device) for t in (features, values, decoder, b_dec)))
    same(got.cpu(), decode_sparse_reference(features, values, decoder, b_dec, None, None).to(dtype))
