"""count_above on a GPU: exact TopK membership of a few features without finding the k.

Two launches:

1. `_given_features`: p of each token's own features, and which tokens, and tiles of them, have one to rank.
2. `_count_ahead`: the matrix product over the whole SAE, whose tiles are compared with those p and forgotten. A program
   whose tokens have nothing to rank returns before it reads anything of the encoder: a step that needs no ranks costs
   the launches.

Both add up in the same order (`encoder_tile.pre_activation_tile`), so that equal features tie in bits. Counts are
integers, so the order in which programs add theirs does not show.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from steer_kernels import workspace
from steer_kernels.encoder_tile import NAN_KEY, TAKEN, pre_activation_tile, rank_key
from steer_kernels.pre_activations import row_major
from steer_kernels.tile_shapes import FEATURES, MAX_TOKENS, tile_shape
from steer_kernels.triton_target import triton_backend
from steer_kernels.wanted import Wanted

MAX_GIVEN = FEATURES
"""Features a token can ask for: they fill one tile."""


# What changes from step to step must not compile another kernel in the middle of serving.
CHANGING = ["n_tokens", "given_stride", "n_given"]


@triton.jit(do_not_specialize=CHANGING)
def _given_features(
    x_ptr,
    encoder_ptr,
    b_enc_ptr,
    scale_ptr,
    given_ptr,
    p_ptr,
    ahead_ptr,
    keys_ptr,
    to_rank_ptr,
    to_rank_tiles_ptr,
    n_tokens,
    d_sae,
    d_in,
    x_stride,
    encoder_stride,
    encoder_inner_stride,
    given_stride,
    n_given,
    floor,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    # As tall as a tile of the second launch, for the same order of sums; the other tokens are left out.
    rows = tl.program_id(0) // TOKENS * TOKENS + tl.arange(0, TOKENS)
    own = rows == token
    at = tl.arange(0, FEATURES)
    given = tl.load(given_ptr + token * given_stride + at, mask=at < n_given, other=-1)
    asked = given >= 0
    if tl.max(asked.to(tl.int32), axis=0) == 0:
        tl.store(p_ptr + token * n_given + at, tl.zeros([FEATURES], dtype=tl.float32), mask=at < n_given)
        tl.store(ahead_ptr + token * n_given + at, tl.full([FEATURES], 1, tl.int32) * d_sae, mask=at < n_given)
        tl.store(keys_ptr + token * n_given + at, tl.full([FEATURES], 1, tl.int32) * TAKEN, mask=at < n_given)
        tl.store(to_rank_ptr + token, 0)
        return
    tile = pre_activation_tile(
        x_ptr, encoder_ptr, b_enc_ptr, scale_ptr, rows, own, given, asked,
        d_in, x_stride, encoder_stride, encoder_inner_stride, HAS_SCALE, TOKENS, FEATURES, INNER,
    )  # fmt: skip
    # Zeros and one number add up to that number, whatever it is.
    p = tl.where(asked, tl.sum(tl.where(own[:, None], tile, 0.0), axis=0), 0.0)
    size = p
    if ABSOLUTE:
        size = tl.abs(p)
    ranked = asked & (size > floor)
    tl.store(p_ptr + token * n_given + at, p, mask=at < n_given)
    tl.store(ahead_ptr + token * n_given + at, tl.where(ranked, 0, d_sae), mask=at < n_given)
    tl.store(keys_ptr + token * n_given + at, tl.where(ranked, rank_key(p, ABSOLUTE), TAKEN), mask=at < n_given)
    some = tl.max(ranked.to(tl.int32), axis=0)
    tl.store(to_rank_ptr + token, some)
    tl.atomic_max(to_rank_tiles_ptr + token // TOKENS, some)


@triton.jit(do_not_specialize=CHANGING)
def _count_ahead(
    x_ptr,
    encoder_ptr,
    b_enc_ptr,
    scale_ptr,
    given_ptr,
    ahead_ptr,
    keys_ptr,
    to_rank_tiles_ptr,
    n_tokens,
    d_sae,
    d_in,
    x_stride,
    encoder_stride,
    encoder_inner_stride,
    given_stride,
    n_given,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    if tl.load(to_rank_tiles_ptr + tl.program_id(0)) == 0:
        return
    # Tiles of tokens are the fast axis: those that read the same features run side by side and share them in L2.
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    row_exists, feature_exists = rows < n_tokens, features < d_sae
    p = pre_activation_tile(
        x_ptr, encoder_ptr, b_enc_ptr, scale_ptr, rows, row_exists, features, feature_exists,
        d_in, x_stride, encoder_stride, encoder_inner_stride, HAS_SCALE, TOKENS, FEATURES, INNER,
    )  # fmt: skip
    keys = tl.where(feature_exists[None, :], rank_key(p, ABSOLUTE), TAKEN)
    at = rows.to(tl.int64)
    for i in range(n_given):
        own_key = tl.load(keys_ptr + at * n_given + i, mask=row_exists, other=TAKEN)
        ranked = own_key > NAN_KEY
        if tl.max(ranked.to(tl.int32), axis=0) == 1:
            own_feature = tl.load(given_ptr + at * given_stride + i, mask=row_exists, other=-1)
            tied = (keys == own_key[:, None]) & (features[None, :] < own_feature[:, None])
            # The feature itself is never ahead, whatever the last bit of its second sum.
            ahead = (tied | (keys > own_key[:, None])) & (features[None, :] != own_feature[:, None])
            tl.atomic_add(ahead_ptr + at * n_given + i, tl.sum(ahead.to(tl.int32), axis=1), mask=ranked)


def count_above_triton(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    features: torch.Tensor,
    floor: float,
    absolute: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `count_above_reference`, with p in float32, for at most 128 features a token."""
    (n_tokens, n_given), x, features = features.shape, row_major(x), row_major(features)
    if n_given > MAX_GIVEN:
        raise ValueError(f"features must be at most {MAX_GIVEN} a token, not {n_given}")
    p = torch.empty(n_tokens, n_given, dtype=torch.float32, device=x.device)
    ahead = torch.empty(n_tokens, n_given, dtype=torch.int32, device=x.device)
    for start in range(0, n_tokens, MAX_TOKENS):
        part = slice(start, start + MAX_TOKENS)
        part_scale = None if scale is None else scale[part]
        _one_pass(x[part], encoder, b_enc, features[part], floor, absolute, part_scale, p[part], ahead[part])
    return p, ahead


def _one_pass(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    features: torch.Tensor,
    floor: float,
    absolute: bool,
    scale: torch.Tensor | None,
    p: torch.Tensor,
    ahead: torch.Tensor,
) -> None:
    n_tokens, n_given = features.shape
    operands, sizes, meta = _arguments(x, encoder, b_enc, features, scale, absolute)
    keys, *to_rank = workspace.carve(x.device, ((n_tokens, n_given), torch.int32), *to_rank_pieces(n_tokens, x.dtype))
    given_features(x, encoder, b_enc, features, floor, absolute, scale, p, ahead, keys, Wanted(*to_rank))
    tiles = to_rank[1]
    grid = (len(tiles), triton.cdiv(encoder.shape[0], FEATURES))
    _count_ahead[grid](*operands, ahead, keys, tiles, *sizes, **meta)


def to_rank_pieces(n_tokens: int, dtype: torch.dtype) -> tuple[tuple[tuple[int], torch.dtype], ...]:
    """Shapes and dtypes of the two parts of `Wanted`."""
    tile = tile_shape(n_tokens, dtype, triton_backend()).tokens
    return ((n_tokens,), torch.int32), ((triton.cdiv(n_tokens, tile),), torch.int32)


def given_features(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    features: torch.Tensor,
    floor: float,
    absolute: bool,
    scale: torch.Tensor | None,
    p: torch.Tensor,
    ahead: torch.Tensor,
    keys: torch.Tensor,
    to_rank: Wanted,
) -> None:
    """Write p of the given features; ahead, 0 where one is to be ranked and d_sae elsewhere; their rank keys, TAKEN
    where none is to be ranked; and which tokens have one. p, ahead and keys are [tokens, n], row-major."""
    operands, sizes, meta = _arguments(x, encoder, b_enc, features, scale, absolute)
    to_rank.tiles.zero_()
    _given_features[(len(x),)](*operands, p, ahead, keys, to_rank.tokens, to_rank.tiles, *sizes, floor, **meta)


def _arguments(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    features: torch.Tensor,
    scale: torch.Tensor | None,
    absolute: bool,
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """(operands, sizes, constants) that both launches have in common."""
    shape = tile_shape(len(x), x.dtype, triton_backend())
    sizes = (len(x), *encoder.shape, x.stride(0), *encoder.stride(), features.stride(0), features.shape[1])
    constants = dict(
        HAS_SCALE=scale is not None, ABSOLUTE=absolute, TOKENS=shape.tokens, FEATURES=FEATURES, INNER=shape.inner,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return (x, encoder, b_enc, b_enc if scale is None else scale, features), sizes, constants
