"""Inputs whose answers are known to the bit, and the four kernels called the same way wherever they run."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from steer_kernels import count_above as count_above_op
from steer_kernels import decode_sparse as decode_sparse_op
from steer_kernels import encode_threshold as encode_threshold_op
from steer_kernels import encode_topk as encode_topk_op
from tests.kernels.conftest import INTERPRETED

DRAWN = settings(max_examples=6 if INTERPRETED else 60)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# One, primes, the borders of tiles (16, 32, 64, 128 tokens; 128 features; 32 or 64 of d_in), and more than one tile.
SHAPES = [
    (1, 1, 1),
    (1, 7, 127),
    (3, 31, 128),
    (16, 64, 129),
    (17, 65, 257),
    (33, 13, 331),
    (65, 3, 211),
    (129, 5, 640),
]
# A token costs the interpreter some 30 ms a kernel: it gets one tile, several of features, and several of tokens.
FEW_SHAPES = [
    (1, 1, 1, torch.float32),
    (3, 31, 128, torch.bfloat16),
    (17, 65, 257, torch.float16),
    (33, 13, 331, torch.float32),
]
TYPED_SHAPES = FEW_SHAPES if INTERPRETED else [(*shape, dtype) for shape in SHAPES for dtype in DTYPES]


def encoder(tokens, d_in, d_sae, dtype, seed=0, bound=2):
    """(x, encoder, b_enc, scale) of small integers: every product and every sum is exact in every dtype and any order,
    so results must equal the float64 oracle's to the bit, and many pre-activations tie."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    return (
        integers(-bound, bound, tokens, d_in).to(dtype),
        integers(-bound, bound, d_sae, d_in).to(dtype),
        integers(-bound, bound, d_sae).float(),
        integers(1, 3, tokens).float(),
    )


def real_encoder(tokens, d_in, d_sae, dtype, seed=0):
    """(x, encoder, b_enc, scale) of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, d_in, generator=generator).to(dtype),
        torch.randn(d_sae, d_in, generator=generator).div(d_in**0.5).to(dtype),
        torch.randn(d_sae, generator=generator).mul(0.1),
        torch.rand(tokens, generator=generator).add(0.5),
    )


def rounding_bound(x, encoder, b_enc, scale=None):
    """[tokens, 1] float64: how far p added up in float32, in any order, can be from the exact sum.

    n additions err by at most n * 2**-24 of the sum of magnitudes each (Higham, Accuracy and Stability, 4.2); twice
    that, because tensor cores truncate where IEEE rounds.
    """
    size = x.double().abs() @ encoder.double().abs().T
    if scale is not None:
        size *= scale.double().unsqueeze(-1)
    return (2 * (x.shape[1] + 2) * 2.0**-24 * (size + b_enc.double().abs())).amax(-1, keepdim=True)


def place(device, *tensors):
    target = "cuda" if device == "cuda" else "cpu"
    return [t if t is None else t.to(target) for t in tensors]


@st.composite
def shapes(draw):
    """(tokens, d_in, d_sae, seed) small enough for the interpreter."""
    tokens = st.integers(1, 9 if INTERPRETED else 40)
    return draw(tokens), draw(st.integers(1, 70)), draw(st.integers(1, 400)), draw(st.integers(0, 2**31))


def encode_topk(device, x, encoder, b_enc, k, absolute=False, scale=None):
    x, encoder, b_enc, scale = place(device, x, encoder, b_enc, scale)
    if device == "interpreter":
        from steer_kernels.encode_topk.triton_kernel import encode_topk_triton

        encoded = encode_topk_triton(x, encoder, b_enc, k, absolute, scale)
        return encoded.values, encoded.features
    return [t.cpu() for t in encode_topk_op.encode_topk(x, encoder, b_enc, k, absolute, scale)]


def encode_threshold(device, x, encoder, b_enc, threshold, capacity, scale=None):
    x, encoder, b_enc, threshold, scale = place(device, x, encoder, b_enc, threshold, scale)
    if device == "interpreter":
        from steer_kernels.encode_threshold.triton_kernel import encode_threshold_triton

        encoded = encode_threshold_triton(x, encoder, b_enc, threshold, capacity, scale)
        return encoded.values, encoded.features, encoded.counts
    op = encode_threshold_op.encode_threshold
    return [t.cpu() for t in op(x, encoder, b_enc, threshold, capacity, scale)]


def count_above(device, x, encoder, b_enc, features, floor, absolute=False, scale=None):
    x, encoder, b_enc, features, scale = place(device, x, encoder, b_enc, features, scale)
    if device == "interpreter":
        from steer_kernels.count_above.triton_kernel import count_above_triton

        return count_above_triton(x, encoder, b_enc, features, floor, absolute, scale)
    op = count_above_op.count_above
    return [t.cpu() for t in op(x, encoder, b_enc, features, floor, absolute, scale)]


def decode_sparse(device, features, values, decoder, b_dec=None, scale=None, base=None, dtype=torch.float32):
    tensors = place(device, features, values, decoder, b_dec, scale, base)
    if device == "interpreter":
        from steer_kernels.decode_sparse.triton_kernel import decode_sparse_triton

        return decode_sparse_triton(*tensors, dtype)
    return decode_sparse_op.decode_sparse(*tensors, dtype).cpu()


def same(got, expected):
    """Equal to the bit, NaN where NaN is."""
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=0, equal_nan=True)
