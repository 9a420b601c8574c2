"""encode_threshold on a GPU: p of all features never reaches memory, and the order of the lists is no accident.

Lists that are appended to by atomic counters come out in another order every time. Instead, three launches:

1. `_keep_active_of_tiles`: the matrix product, tile by tile; of each tile a token keeps its first `slots` active
   features, and how many there are.
2. `_gather_lists`: a program a token adds the tiles' numbers up, which says where in the list each tile starts, and
   copies what was kept. A tile with more active features than slots is *full*.
3. `_run_full_tiles_again`: exits at once for tokens without a full tile; computes the others' full tiles again, bit for
   bit, and writes all of their active features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from steer_kernels import workspace
from steer_kernels.encoder_tile import pre_activation_tile
from steer_kernels.pre_activations import row_major
from steer_kernels.tile_shapes import FEATURES, MAX_TOKENS, slots_per_tile, tile_shape
from steer_kernels.triton_target import triton_backend

CAPACITY_PER_ACTIVE = 4
"""How many times the usual number of active features a list is expected to be long."""

TILES = 64
"""Tiles that a program of `_gather_lists` places at once."""


@triton.jit(do_not_specialize=["n_tokens"])
def _keep_active_of_tiles(
    x_ptr,
    encoder_ptr,
    b_enc_ptr,
    scale_ptr,
    threshold_ptr,
    kept_values_ptr,
    kept_features_ptr,
    n_active_ptr,
    n_tokens,
    d_sae,
    d_in,
    x_stride,
    encoder_stride,
    encoder_inner_stride,
    n_tiles,
    slots,
    HAS_SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    # Tiles of tokens are the fast axis: those that read the same features run side by side and share them in L2.
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tile = tl.program_id(1)
    features = tile * FEATURES + tl.arange(0, FEATURES)
    row_exists = rows < n_tokens
    feature_exists = features < d_sae
    p = pre_activation_tile(
        x_ptr, encoder_ptr, b_enc_ptr, scale_ptr, rows, row_exists, features, feature_exists,
        d_in, x_stride, encoder_stride, encoder_inner_stride, HAS_SCALE, TOKENS, FEATURES, INNER,
    )  # fmt: skip
    threshold = tl.load(threshold_ptr + features, mask=feature_exists, other=float("inf"))
    active = (p > threshold[None, :]) & feature_exists[None, :]
    place = tl.where(active, tl.cumsum(active.to(tl.int32), axis=1) - 1, -1)
    kept_at = rows.to(tl.int64) * n_tiles + tile
    # Slot by slot: a store of each element to its own place would need two registers an element for addresses.
    for slot in range(slots):
        here = place == slot
        value = tl.sum(tl.where(here, p, 0.0), axis=1)
        feature = tl.sum(tl.where(here, features[None, :], 0), axis=1)
        tl.store(kept_values_ptr + kept_at * slots + slot, value, mask=row_exists)
        tl.store(kept_features_ptr + kept_at * slots + slot, feature, mask=row_exists)
    tl.store(n_active_ptr + kept_at, tl.sum(active.to(tl.int32), axis=1), mask=row_exists)


@triton.jit
def _gather_lists(
    kept_values_ptr,
    kept_features_ptr,
    n_active_ptr,
    full_ptr,
    n_full_ptr,
    values_ptr,
    features_ptr,
    counts_ptr,
    n_tiles,
    slots,
    capacity,
    max_full,
    SLOTS: tl.constexpr,
    TILES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    count = tl.zeros([], dtype=tl.int32)
    n_full = tl.zeros([], dtype=tl.int32)
    for first in range(0, n_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        exists = tile < n_tiles
        n_active = tl.load(n_active_ptr + token * n_tiles + tile, mask=exists, other=0)
        start = count + tl.cumsum(n_active, axis=0) - n_active
        kept_at = (token * n_tiles + tile)[:, None] * slots + slot[None, :]
        kept = (slot[None, :] < tl.minimum(n_active, slots)[:, None]) & exists[:, None]
        place = start[:, None] + slot[None, :]
        fits = kept & (place < capacity)
        values = tl.load(kept_values_ptr + kept_at, mask=fits, other=0.0)
        features = tl.load(kept_features_ptr + kept_at, mask=fits, other=0)
        tl.store(values_ptr + token * capacity + place, values, mask=fits)
        tl.store(features_ptr + token * capacity + place, features.to(tl.int64), mask=fits)
        full = (n_active > slots) & (start < capacity)
        full_at = full_ptr + 2 * (token * max_full + n_full + tl.cumsum(full.to(tl.int32), axis=0) - 1)
        tl.store(full_at, tile, mask=full)
        tl.store(full_at + 1, start, mask=full)
        n_full += tl.sum(full.to(tl.int32), axis=0)
        count += tl.sum(n_active, axis=0)
    tl.store(counts_ptr + token, count)
    tl.store(n_full_ptr + token, n_full)
    for first in range(0, capacity, TILES):
        place = first + tl.arange(0, TILES)
        rest = (place >= count) & (place < capacity)
        tl.store(values_ptr + token * capacity + place, tl.zeros([TILES], dtype=tl.float32), mask=rest)
        tl.store(features_ptr + token * capacity + place, tl.full([TILES], -1, tl.int64), mask=rest)


@triton.jit(do_not_specialize=["n_tokens"])
def _run_full_tiles_again(
    x_ptr,
    encoder_ptr,
    b_enc_ptr,
    scale_ptr,
    threshold_ptr,
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
    capacity,
    max_full,
    HAS_SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    n_full = tl.load(n_full_ptr + token)
    if n_full == 0:
        return
    # The tile of tokens that the first launch had: its sums come out the same.
    rows = tl.program_id(0) // TOKENS * TOKENS + tl.arange(0, TOKENS)
    for i in range(n_full):
        full_at = full_ptr + 2 * (token * max_full + i)
        tile = tl.load(full_at)
        start = tl.load(full_at + 1)
        features = tile * FEATURES + tl.arange(0, FEATURES)
        feature_exists = features < d_sae
        p = pre_activation_tile(
            x_ptr, encoder_ptr, b_enc_ptr, scale_ptr, rows, rows < n_tokens, features, feature_exists,
            d_in, x_stride, encoder_stride, encoder_inner_stride, HAS_SCALE, TOKENS, FEATURES, INNER,
        )  # fmt: skip
        # Zeros and one number add up to that number, whatever it is.
        own = tl.sum(tl.where((rows == token)[:, None], p, 0.0), axis=0)
        active = (own > tl.load(threshold_ptr + features, mask=feature_exists, other=float("inf"))) & feature_exists
        place = start + tl.cumsum(active.to(tl.int32), axis=0) - 1
        fits = active & (place < capacity)
        tl.store(values_ptr + token * capacity + place, own, mask=fits)
        tl.store(features_ptr + token * capacity + place, features.to(tl.int64), mask=fits)


@dataclass(frozen=True)
class EncodedThreshold:
    """values float32 and features int64 [tokens, capacity], counts [tokens] int32.

    full_tiles: [tokens] int32, tiles that were run again.
    """

    values: torch.Tensor
    features: torch.Tensor
    counts: torch.Tensor
    full_tiles: torch.Tensor


def workspace_pieces(
    tokens: int, d_sae: int, capacity: int, slots: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of a pass's scratch: what tiles keep (p, features, how many), and full tiles with their starts.

    Full tiles that start inside the list have more than `slots` places in it, all but the last.
    """
    n_tiles = triton.cdiv(d_sae, FEATURES)
    return (
        ((tokens, n_tiles, slots), torch.float32),
        ((tokens, n_tiles, slots), torch.int32),
        ((tokens, n_tiles), torch.int32),
        ((tokens, capacity // (slots + 1) + 1, 2), torch.int32),
    )


def encode_threshold_triton(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    threshold: torch.Tensor,
    capacity: int,
    scale: torch.Tensor | None = None,
    slots: int | None = None,
) -> EncodedThreshold:
    """As `encode_threshold_reference`, with p in float32.

    slots: active features that a tile keeps, by default so many that tiles seldom have to be run again while the lists
    are a quarter full.
    """
    n_tokens, d_sae, x = x.shape[0], encoder.shape[0], row_major(x)
    if slots is None:
        slots = slots_per_tile(d_sae, max(1, min(d_sae, capacity // CAPACITY_PER_ACTIVE)))
    encoded = EncodedThreshold(
        values=torch.empty(n_tokens, capacity, dtype=torch.float32, device=x.device),
        features=torch.empty(n_tokens, capacity, dtype=torch.int64, device=x.device),
        counts=torch.empty(n_tokens, dtype=torch.int32, device=x.device),
        full_tiles=torch.empty(n_tokens, dtype=torch.int32, device=x.device),
    )
    for start in range(0, n_tokens, MAX_TOKENS):
        part = slice(start, start + MAX_TOKENS)
        whole = (encoded.values, encoded.features, encoded.counts, encoded.full_tiles)
        out = EncodedThreshold(*(tensor[part] for tensor in whole))
        _one_pass(x[part], encoder, b_enc, threshold, None if scale is None else scale[part], slots, out)
    return encoded


def _one_pass(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
    slots: int,
    out: EncodedThreshold,
) -> None:
    (n_tokens, d_in), d_sae, capacity = x.shape, encoder.shape[0], out.values.shape[1]
    shape = tile_shape(n_tokens, x.dtype, triton_backend())
    n_tiles = triton.cdiv(d_sae, FEATURES)
    kept_values, kept_features, n_active, full = workspace.carve(
        x.device, *workspace_pieces(n_tokens, d_sae, capacity, slots)
    )
    operands = (x, encoder, b_enc, b_enc if scale is None else scale, threshold)
    sizes = (n_tokens, d_sae, d_in, x.stride(0), *encoder.stride())
    meta = dict(
        HAS_SCALE=scale is not None, TOKENS=shape.tokens, FEATURES=FEATURES, INNER=shape.inner,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    grid = (triton.cdiv(n_tokens, shape.tokens), n_tiles)
    _keep_active_of_tiles[grid](*operands, kept_values, kept_features, n_active, *sizes, n_tiles, slots, **meta)
    _gather_lists[(n_tokens,)](
        kept_values, kept_features, n_active, full, out.full_tiles, out.values, out.features, out.counts,
        n_tiles, slots, capacity, full.shape[1],
        SLOTS=triton.next_power_of_2(slots), TILES=TILES, num_warps=4,
    )  # fmt: skip
    _run_full_tiles_again[(n_tokens,)](
        *operands, full, out.full_tiles, out.values, out.features, *sizes, capacity, full.shape[1], **meta
    )
