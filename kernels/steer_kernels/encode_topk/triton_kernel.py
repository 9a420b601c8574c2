"""encode_topk on a GPU: p of all features never reaches memory.

Three launches, none of which waits for the host:

1. `_keep_first_of_tiles`: the matrix product, tile by tile; of each tile of 128 features a token keeps the first
   `slots`.
2. `_select`: a program a token takes the k first of what was kept. The certificate: where a tile's last kept feature is
   not among these k, nothing that the tile dropped can be. A tile whose last kept feature was selected is *full*.
3. `_run_full_tiles_again`: exits at once for tokens without a full tile, which nearly all are. For the others it
   computes their full tiles again, bit for bit, and merges in what was dropped.

A selected set of k holds at most k // slots full tiles, which bounds the list that the third launch walks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from steer_kernels import workspace
from steer_kernels.encoder_tile import (
    EMPTY,
    TAKEN,
    bound_of_first,
    packed_rank,
    pre_activation_tile,
    rank_key,
    store_compacted,
    unpacked_rank,
)
from steer_kernels.pre_activations import row_major
from steer_kernels.tile_shapes import FEATURES, MAX_TOKENS, slots_per_tile, tile_shape
from steer_kernels.triton_target import triton_backend
from steer_kernels.wanted import Wanted

MAX_KEPT = 16384
"""Kept ranks that a program of `_select` holds in registers, 64 a thread at most. Tiles of larger SAEs keep fewer than
they should, and are run again more often."""

MAX_K = 1024


@triton.jit(do_not_specialize=["n_tokens"])
def _keep_first_of_tiles(
    x_ptr,
    encoder_ptr,
    b_enc_ptr,
    scale_ptr,
    kept_ptr,
    n_tokens,
    d_sae,
    d_in,
    x_stride,
    encoder_stride,
    encoder_inner_stride,
    n_tiles,
    slots,
    wanted_tiles_ptr,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    if GATED:  # noqa: SIM102 - compiled only where it is true, as the rest of an `and` would not be
        if tl.load(wanted_tiles_ptr + tl.program_id(0)) == 0:
            return
    # Tiles of tokens are the fast axis: those that read the same features run side by side and share them in L2.
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tile = tl.program_id(1)
    column = tl.arange(0, FEATURES)
    features = tile * FEATURES + column
    row_exists, feature_exists = rows < n_tokens, features < d_sae
    p = pre_activation_tile(
        x_ptr, encoder_ptr, b_enc_ptr, scale_ptr, rows, row_exists, features, feature_exists,
        d_in, x_stride, encoder_stride, encoder_inner_stride, HAS_SCALE, TOKENS, FEATURES, INNER,
    )  # fmt: skip
    keys = tl.where(feature_exists[None, :], rank_key(p, ABSOLUTE), TAKEN)
    kept_rows = kept_ptr + rows.to(tl.int64) * (n_tiles * slots) + tile * slots
    for slot in range(slots):
        key, at = tl.max(keys, axis=1, return_indices=True, return_indices_tie_break_left=True)
        here = column[None, :] == at[:, None]
        negative = tl.zeros([TOKENS], dtype=tl.int32)
        if ABSOLUTE:
            negative = tl.sum((here & (p < 0)).to(tl.int32), axis=1)
        tl.store(kept_rows + slot, packed_rank(key, tile * FEATURES + at, negative), mask=row_exists)
        keys = tl.where(here, TAKEN, keys)


@triton.jit
def _write_in_order(first_ptr, values_ptr, features_ptr, k, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Unpack the k ranks at first_ptr into sorted values and features: the place of each is the number ahead of it."""
    at = tl.arange(0, SIZE)
    first = tl.load(first_ptr + at, mask=at < k, other=EMPTY)
    place = tl.zeros([SIZE], dtype=tl.int32)
    for start in range(0, k, BLOCK):
        other = start + tl.arange(0, BLOCK)
        others = tl.load(first_ptr + other, mask=other < k, other=EMPTY)
        place += tl.sum((others[None, :] > first[:, None]).to(tl.int32), axis=1)
    values, features = unpacked_rank(first)
    tl.store(values_ptr + place, values, mask=at < k)
    tl.store(features_ptr + place, features, mask=at < k)


@triton.jit
def _select(
    kept_ptr,
    first_ptr,
    full_ptr,
    n_full_ptr,
    values_ptr,
    features_ptr,
    d_sae,
    n_tiles,
    slots,
    k,
    first_stride,
    max_full,
    wanted_ptr,
    GATED: tl.constexpr,
    KEPT: tl.constexpr,
    TILES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if GATED:  # noqa: SIM102
        if tl.load(wanted_ptr + token) == 0:
            tl.store(n_full_ptr + token, 0)
            return
    n_kept = n_tiles * slots
    kept_row = kept_ptr + token * n_kept
    first_row = first_ptr + token * first_stride
    at = tl.arange(0, KEPT)
    kept = tl.load(kept_row + at, mask=at < n_kept, other=EMPTY)
    bound = bound_of_first(kept, k)
    store_compacted(first_row, kept, bound)

    tile = tl.arange(0, TILES)
    dropped_some = (tile < n_tiles) & (tl.minimum(d_sae - tile * FEATURES, FEATURES) > slots)
    last_kept = tl.load(kept_row + tile * slots + slots - 1, mask=dropped_some, other=EMPTY)
    full = dropped_some & (last_kept >= bound)
    place = tl.cumsum(full.to(tl.int32), axis=0) - 1
    tl.store(full_ptr + token * max_full + place, tile, mask=full)
    tl.store(n_full_ptr + token, tl.sum(full.to(tl.int32), axis=0))

    # What other threads of the program stored is read next.
    tl.debug_barrier()
    _write_in_order(first_row, values_ptr + token * k, features_ptr + token * k, k, SIZE, BLOCK)


@triton.jit(do_not_specialize=["n_tokens"])
def _run_full_tiles_again(
    x_ptr,
    encoder_ptr,
    b_enc_ptr,
    scale_ptr,
    kept_ptr,
    first_ptr,
    full_ptr,
    n_full_ptr,
    values_ptr,
    features_ptr,
    n_tokens,
    d_sae,
    d_in,
    x_stride,
    encoder_stride,
    encoder_inner_stride,
    n_tiles,
    slots,
    k,
    first_stride,
    max_full,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
    UNION: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    n_full = tl.load(n_full_ptr + token)
    if n_full == 0:
        return
    first_row = first_ptr + token * first_stride
    n_first = tl.minimum(k, (n_tiles - 1) * slots + tl.minimum(slots, d_sae - (n_tiles - 1) * FEATURES))
    # The tile of tokens that the first launch had: its sums come out the same.
    rows = tl.program_id(0) // TOKENS * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, FEATURES)
    for i in range(n_full):
        tile = tl.load(full_ptr + token * max_full + i)
        features = tile * FEATURES + column
        feature_exists = features < d_sae
        p = pre_activation_tile(
            x_ptr, encoder_ptr, b_enc_ptr, scale_ptr, rows, rows < n_tokens, features, feature_exists,
            d_in, x_stride, encoder_stride, encoder_inner_stride, HAS_SCALE, TOKENS, FEATURES, INNER,
        )  # fmt: skip
        # Zeros and one number add up to that number, whatever it is.
        own = tl.sum(tl.where((rows == token)[:, None], p, 0.0), axis=0)
        negative = tl.zeros([FEATURES], dtype=tl.int32)
        if ABSOLUTE:
            negative = (own < 0).to(tl.int32)
        packed = packed_rank(tl.where(feature_exists, rank_key(own, ABSOLUTE), TAKEN), features, negative)
        last_kept = tl.load(kept_ptr + token * n_tiles * slots + tile * slots + slots - 1)
        tl.store(first_row + n_first + column, tl.where(packed < last_kept, packed, EMPTY))
        tl.debug_barrier()
        at = tl.arange(0, UNION)
        union = tl.load(first_row + at, mask=at < n_first + FEATURES, other=EMPTY)
        tl.debug_barrier()
        store_compacted(first_row, union, bound_of_first(union, k))
        n_first = tl.minimum(k, tl.sum((union != EMPTY).to(tl.int32), axis=0))
    tl.debug_barrier()
    _write_in_order(first_row, values_ptr + token * k, features_ptr + token * k, k, SIZE, BLOCK)


@dataclass(frozen=True)
class EncodedTopK:
    """values [tokens, k] float32, features [tokens, k] int64, full_tiles [tokens] int32: tiles that were run again."""

    values: torch.Tensor
    features: torch.Tensor
    full_tiles: torch.Tensor


def default_slots(d_sae: int, k: int) -> int:
    """Features that a tile keeps, so that tiles seldom have to be run again."""
    return max(1, min(slots_per_tile(d_sae, k), MAX_KEPT // triton.cdiv(d_sae, FEATURES)))


def workspace_pieces(tokens: int, d_sae: int, k: int, slots: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of a pass's scratch: what tiles keep; what is selected, and a tile beside it; full tiles."""
    return (
        ((tokens, triton.cdiv(d_sae, FEATURES) * slots), torch.int64),
        ((tokens, k + FEATURES), torch.int64),
        ((tokens, max(1, k // slots)), torch.int32),
    )


def encode_topk_triton(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    k: int,
    absolute: bool = False,
    scale: torch.Tensor | None = None,
    slots: int | None = None,
) -> EncodedTopK:
    """As `encode_topk_reference`, with p in float32 and k at most 1024.

    slots: features that a tile keeps, by default so many that tiles seldom have to be run again.
    """
    d_sae, x = encoder.shape[0], row_major(x)
    slots = default_slots(d_sae, k) if slots is None else slots
    if k > MAX_K or triton.cdiv(d_sae, FEATURES) * slots > MAX_KEPT:
        raise ValueError(
            f"k must be at most {MAX_K} and d_sae at most {MAX_KEPT // slots * FEATURES}, not k = {k}, d_sae = {d_sae}"
        )
    encoded = EncodedTopK(
        values=torch.empty(x.shape[0], k, dtype=torch.float32, device=x.device),
        features=torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device),
        full_tiles=torch.empty(x.shape[0], dtype=torch.int32, device=x.device),
    )
    for start in range(0, x.shape[0], MAX_TOKENS):
        part = slice(start, start + MAX_TOKENS)
        one_pass(
            x[part], encoder, b_enc, None if scale is None else scale[part], k, absolute, slots,
            EncodedTopK(encoded.values[part], encoded.features[part], encoded.full_tiles[part]),
        )  # fmt: skip
    return encoded


def one_pass(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    scale: torch.Tensor | None,
    k: int,
    absolute: bool,
    slots: int,
    out: EncodedTopK,
    wanted: Wanted | None = None,
) -> None:
    """encode_topk of at most MAX_TOKENS tokens into `out`, of those that are wanted where that is given."""
    (n_tokens, d_in), d_sae = x.shape, encoder.shape[0]
    shape = tile_shape(n_tokens, x.dtype, triton_backend())
    n_tiles = triton.cdiv(d_sae, FEATURES)
    kept, first, full = workspace.carve(x.device, *workspace_pieces(n_tokens, d_sae, k, slots))
    operands = (x, encoder, b_enc, b_enc if scale is None else scale)
    sizes = (n_tokens, d_sae, d_in, x.stride(0), *encoder.stride(), n_tiles, slots)
    lists = (k, first.stride(0), full.stride(0))
    meta = dict(
        HAS_SCALE=scale is not None, ABSOLUTE=absolute, TOKENS=shape.tokens, FEATURES=FEATURES, INNER=shape.inner,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    gated = wanted is not None
    wanted_tokens, wanted_tiles = (wanted.tokens, wanted.tiles) if wanted is not None else (full, full)
    grid = (triton.cdiv(n_tokens, shape.tokens), n_tiles)
    _keep_first_of_tiles[grid](*operands, kept, *sizes, wanted_tiles, GATED=gated, **meta)
    select = select_meta(n_tiles * slots, n_tiles, k)
    _select[(n_tokens,)](
        kept, first, full, out.full_tiles, out.values, out.features, d_sae, n_tiles, slots, *lists, wanted_tokens,
        GATED=gated, **select,
    )  # fmt: skip
    _run_full_tiles_again[(n_tokens,)](
        *operands, kept, first, full, out.full_tiles, out.values, out.features, *sizes, *lists,
        **meta, UNION=triton.next_power_of_2(k + FEATURES), SIZE=select["SIZE"], BLOCK=select["BLOCK"],
    )  # fmt: skip


def select_meta(n_kept: int, n_tiles: int, k: int) -> dict[str, int]:
    """Constants that `_select` is compiled with."""
    kept, size = max(16, triton.next_power_of_2(n_kept)), max(16, triton.next_power_of_2(k))
    return dict(
        KEPT=kept,
        TILES=max(16, triton.next_power_of_2(n_tiles)),
        SIZE=size,
        BLOCK=max(4, min(size, 4096 // size)),
        FEATURES=FEATURES,
        num_warps=min(16, max(4, kept // 2048)),
    )
