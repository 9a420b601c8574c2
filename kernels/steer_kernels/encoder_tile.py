"""Pieces of Triton that the whole-SAE kernels share: a tile of pre-activations, and ranks as integers.

Imported by the Triton kernels only: machines without Triton never get here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_kernels import eight_bit

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TAKEN = tl.constexpr(-(2**31))
"""The rank key of what is not there: past the end of the SAE, or kept already."""
NAN_KEY = tl.constexpr(-(2**31) + 1)
"""The rank key of NaN: before nothing, after minus infinity (whose key is -(2**31) + 2**23)."""
EMPTY = tl.constexpr(-(2**63))
"""A packed rank that comes after all others."""
HIGHEST = tl.constexpr(2**63 - 1)
LOW_31_BITS = tl.constexpr(2**31 - 1)
BIAS_SLACK = tl.constexpr(eight_bit.BIAS_SLACK)
UNDERFLOW = tl.constexpr(eight_bit.UNDERFLOW)


@triton.jit
def products_tile(
    x_ptr,
    encoder_ptr,
    rows,
    row_exists,
    features,
    feature_exists,
    d_in,
    x_stride,
    encoder_stride,
    encoder_inner_stride,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    """x . encoder [TOKENS, FEATURES] float32 of the tokens `rows` and any `features`, zero where none exists.

    The encoder is in x's dtype, or in one of eight bits, whose numbers all of x's dtypes hold.

    An element is added up in the same order whichever tile it is computed in, given the same three constants: so a tile
    that is run again gives the same bits.
    """
    inner = tl.arange(0, INNER)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    encoder_rows = encoder_ptr + features.to(tl.int64)[None, :] * encoder_stride
    products = tl.zeros([TOKENS, FEATURES], dtype=tl.float32)
    for start in range(0, d_in, INNER):
        at = start + inner
        inside = at < d_in
        x = tl.load(x_rows + at[None, :], mask=row_exists[:, None] & inside[None, :], other=0.0)
        columns = encoder_rows + at.to(tl.int64)[:, None] * encoder_inner_stride
        encoder = tl.load(columns, mask=inside[:, None] & feature_exists[None, :], other=0.0)
        if INTERPRETED and x.dtype == tl.bfloat16:
            # Triton 3.9's interpreter multiplies the bit patterns of bfloat16.
            x = x.to(tl.float32)
        # TF32 would round float32 inputs to 10 bits and make ties and order wrong.
        products = tl.dot(x, encoder.to(x.dtype), products, input_precision="ieee")
    return products


@triton.jit
def pre_activation_tile(
    x_ptr,
    encoder_ptr,
    b_enc_ptr,
    scale_ptr,
    rows,
    row_exists,
    features,
    feature_exists,
    d_in,
    x_stride,
    encoder_stride,
    encoder_inner_stride,
    HAS_SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    """p [TOKENS, FEATURES] float32, as `products_tile`; zero rows and columns where no token or feature exists."""
    products = products_tile(
        x_ptr, encoder_ptr, rows, row_exists, features, feature_exists,
        d_in, x_stride, encoder_stride, encoder_inner_stride, TOKENS, FEATURES, INNER,
    )  # fmt: skip
    bias = tl.load(b_enc_ptr + features, mask=feature_exists, other=0.0)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + rows, mask=row_exists, other=0.0)
        # An explicit fma: left to the compiler, two kernels might round differently.
        shape: tl.constexpr = [TOKENS, FEATURES]
        return tl.fma(products, tl.broadcast_to(scale[:, None], shape), tl.broadcast_to(bias[None, :], shape))
    return products + bias[None, :]


@triton.jit
def eight_bit_tile(
    x_ptr,
    weights_ptr,
    step_ptr,
    slack_ptr,
    b_enc_ptr,
    scale_ptr,
    size_ptr,
    rows,
    row_exists,
    features,
    feature_exists,
    d_in,
    x_stride,
    HAS_SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    """(p8, its bound), both [TOKENS, FEATURES] float32, as in `steer_kernels.eight_bit`; weights are row-major."""
    products = products_tile(
        x_ptr, weights_ptr, rows, row_exists, features, feature_exists,
        d_in, x_stride, d_in, 1, TOKENS, FEATURES, INNER,
    )  # fmt: skip
    bias = tl.load(b_enc_ptr + features, mask=feature_exists, other=0.0)
    products *= tl.load(step_ptr + features, mask=feature_exists, other=0.0)[None, :]
    if HAS_SCALE:
        products *= tl.load(scale_ptr + rows, mask=row_exists, other=0.0)[:, None]
    size = tl.load(size_ptr + rows, mask=row_exists, other=0.0)
    slack = tl.load(slack_ptr + features, mask=feature_exists, other=0.0)
    bound = size[:, None] * slack[None, :] + (tl.abs(bias) * BIAS_SLACK + UNDERFLOW)[None, :]
    return products + bias[None, :], bound


@triton.jit
def rank_key(p, ABSOLUTE: tl.constexpr):
    """int32, larger where p ranks higher, equal where it ranks equal.

    The bits of a float order like a signed integer if those of negative numbers, sign aside, are inverted.
    """
    size = p
    if ABSOLUTE:
        size = tl.abs(p)
    # -0.0 ranks as 0.0.
    size = tl.where(size == 0.0, 0.0, size)
    bits = size.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ LOW_31_BITS, bits)
    return tl.where(p == p, key, NAN_KEY)


@triton.jit
def packed_rank(key, feature, negative):
    """int64 that orders by rank key, then by lower feature; the lowest bit carries the sign that `absolute` drops."""
    low = ((feature ^ LOW_31_BITS).to(tl.int64) << 1) | negative.to(tl.int64)
    packed = (key.to(tl.int64) << 32) | low
    return tl.where(key == TAKEN, EMPTY, packed)


@triton.jit
def unpacked_rank(packed):
    """(p float32, feature int64) from packed ranks."""
    key = (packed >> 32).to(tl.int32)
    size = tl.where(key < 0, key ^ LOW_31_BITS, key).to(tl.float32, bitcast=True)
    size = tl.where(key == NAN_KEY, float("nan"), size)
    feature = ((packed >> 1) & LOW_31_BITS) ^ LOW_31_BITS
    return tl.where((packed & 1) == 1, -size, size), feature


@triton.jit
def bound_of_first(packed, k):
    """The lowest of the k first ranks of a vector, or of all where there are fewer: a search by bisection.

    Ranks are distinct, so one with exactly k at or above it exists; the search ends at the first bound that has.
    """
    low = tl.min(tl.where(packed == EMPTY, HIGHEST, packed), axis=0)
    high = tl.max(packed, axis=0)
    count = tl.sum((packed >= low).to(tl.int32), axis=0)
    while count > k:
        # The mean, rounded up, without the sum that could overflow.
        middle = (low | high) - ((low ^ high) >> 1)
        above = tl.sum((packed >= middle).to(tl.int32), axis=0)
        enough = above >= k
        low = tl.where(enough, middle, low)
        count = tl.where(enough, above, count)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def store_compacted(ptr, packed, bound):
    """Store the ranks at or above `bound` one after the other, in the order that they have in the vector."""
    chosen = (packed >= bound) & (packed != EMPTY)
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(ptr + place, packed, mask=chosen)
