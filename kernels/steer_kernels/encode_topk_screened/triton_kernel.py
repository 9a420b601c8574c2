"""encode_topk on a GPU with half the bytes: an eight-bit screen, exact sums of what passes it, and a certificate.

Of every feature the copy gives an upper and a lower end, p8 + bound and p8 - bound, between which p lies. None of the
launches waits for the host:

1. `_screen_tiles`: the matrix product with the copy; of each tile a token keeps the `slots` features whose upper ends
   come first.
2. `_choose_candidates`: a program a token. k features have p at or above the k-th of the lower ends, so what has its
   upper end below that is not among the k. The rest are candidates, the first `capacity` of them at most; noted beside
   them is the first upper end of all that are none.
3. `_rescore`: p of the candidates from the encoder's own rows, to the bit as encode_topk has it.
4. `_certify`: the k first candidates are the answer where the k-th is above that noted end. Tokens where it is not,
   because of ties nearer than the bound or of more candidates than fit, are marked.
5. The launches of encode_topk, which return at once but for marked tokens.

float8_e4m3fn needs a GPU that converts it: NVIDIA's from compute capability 8.9; AMD's gfx942 has another format of
eight bits, and gfx950 has not been tried. int8 runs everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from steer_kernels import workspace
from steer_kernels.eight_bit import EightBitEncoder, token_sizes
from steer_kernels.encode_topk.triton_kernel import EncodedTopK, _write_in_order, default_slots, one_pass
from steer_kernels.encoder_tile import (
    EMPTY,
    TAKEN,
    bound_of_first,
    eight_bit_tile,
    packed_rank,
    pre_activation_tile,
    rank_key,
    store_compacted,
    unpacked_rank,
)
from steer_kernels.pre_activations import row_major
from steer_kernels.tile_shapes import FEATURES, TileShape, slots_per_tile, tile_shape
from steer_kernels.triton_target import converts_e4m3, triton_backend
from steer_kernels.wanted import Wanted

MAX_KEPT = 8192
"""Kept ranks, and as many lower ends, that a program of `_choose_candidates` holds in registers."""

MAX_CANDIDATES = 1024

MAX_TOKENS = 64
"""Tokens that a screen pays for: each reads rows of its own candidates, which together cost what the screen saves."""

FINITE = tl.constexpr(2.0**127)


@triton.jit(do_not_specialize=["n_tokens"])
def _screen_tiles(
    x_ptr,
    weights_ptr,
    step_ptr,
    slack_ptr,
    b_enc_ptr,
    scale_ptr,
    size_ptr,
    kept_ptr,
    lower_ptr,
    n_tokens,
    d_sae,
    d_in,
    x_stride,
    n_tiles,
    slots,
    asked_tiles_ptr,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    if GATED:  # noqa: SIM102 - compiled only where it is true, as the rest of an `and` would not be
        if tl.load(asked_tiles_ptr + tl.program_id(0)) == 0:
            return
    # Tiles of tokens are the fast axis: those that read the same features run side by side and share them in L2.
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tile = tl.program_id(1)
    column = tl.arange(0, FEATURES)
    features = tile * FEATURES + column
    row_exists, feature_exists = rows < n_tokens, features < d_sae
    p, bound = eight_bit_tile(
        x_ptr, weights_ptr, step_ptr, slack_ptr, b_enc_ptr, scale_ptr, size_ptr, rows, row_exists, features,
        feature_exists, d_in, x_stride, HAS_SCALE, TOKENS, FEATURES, INNER,
    )  # fmt: skip
    size = p
    if ABSOLUTE:
        size = tl.abs(p)
    # False where either is NaN: such a p may be anything, and goes to the candidates.
    bounded = tl.abs(p) + bound < FINITE
    upper = tl.where(bounded, size + bound, float("inf"))
    lower = tl.where(bounded, size - bound, float("-inf"))
    keys = tl.where(feature_exists[None, :], rank_key(upper, False), TAKEN)
    at_row = rows.to(tl.int64) * (n_tiles * slots) + tile * slots
    for slot in range(slots):
        key, at = tl.max(keys, axis=1, return_indices=True, return_indices_tie_break_left=True)
        here = column[None, :] == at[:, None]
        positive = tl.zeros([TOKENS], dtype=tl.int32)
        tl.store(kept_ptr + at_row + slot, packed_rank(key, tile * FEATURES + at, positive), mask=row_exists)
        tl.store(lower_ptr + at_row + slot, tl.sum(tl.where(here, lower, 0.0), axis=1), mask=row_exists)
        keys = tl.where(here, TAKEN, keys)


@triton.jit
def _choose_candidates(
    kept_ptr,
    lower_ptr,
    candidates_ptr,
    n_candidates_ptr,
    rest_ptr,
    d_sae,
    n_tiles,
    slots,
    k,
    capacity,
    asked_ptr,
    GATED: tl.constexpr,
    KEPT: tl.constexpr,
    TILES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if GATED:  # noqa: SIM102
        if tl.load(asked_ptr + token) == 0:
            tl.store(n_candidates_ptr + token, 0)
            return
    n_kept = n_tiles * slots
    at = tl.arange(0, KEPT)
    kept = tl.load(kept_ptr + token * n_kept + at, mask=at < n_kept, other=EMPTY)
    lower = tl.load(lower_ptr + token * n_kept + at, mask=at < n_kept, other=0.0)
    lower_key = tl.where(kept == EMPTY, TAKEN, rank_key(lower, False))
    # The bits under the key only have to be distinct; without them all ranks of that key are at or above it.
    kth_lower = (bound_of_first(packed_rank(lower_key, at, tl.zeros([KEPT], dtype=tl.int32)), k) >> 32) << 32
    cut = tl.maximum(bound_of_first(kept, capacity), kth_lower)
    store_compacted(candidates_ptr + token * capacity, kept, cut)
    chosen = (kept >= cut) & (kept != EMPTY)
    tl.store(n_candidates_ptr + token, tl.sum(chosen.to(tl.int32), axis=0))

    tile = tl.arange(0, TILES)
    dropped_some = (tile < n_tiles) & (tl.minimum(d_sae - tile * FEATURES, FEATURES) > slots)
    last_kept = tl.load(kept_ptr + token * n_kept + tile * slots + slots - 1, mask=dropped_some, other=EMPTY)
    rest = tl.maximum(tl.max(tl.where(chosen, EMPTY, kept), axis=0), tl.max(last_kept, axis=0))
    tl.store(rest_ptr + token, (rest >> 32).to(tl.int32))


@triton.jit(do_not_specialize=["n_tokens"])
def _rescore(
    x_ptr,
    encoder_ptr,
    b_enc_ptr,
    scale_ptr,
    candidates_ptr,
    n_candidates_ptr,
    n_tokens,
    d_in,
    x_stride,
    encoder_stride,
    encoder_inner_stride,
    capacity,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    n_candidates = tl.load(n_candidates_ptr + token)
    start = tl.program_id(1) * FEATURES
    if start >= n_candidates:
        return
    # As tall as a tile of encode_topk, for the same order of sums; the other tokens are left out.
    rows = tl.program_id(0) // TOKENS * TOKENS + tl.arange(0, TOKENS)
    own = rows == token
    at = start + tl.arange(0, FEATURES)
    exists = at < n_candidates
    _, features = unpacked_rank(tl.load(candidates_ptr + token * capacity + at, mask=exists, other=0))
    tile = pre_activation_tile(
        x_ptr, encoder_ptr, b_enc_ptr, scale_ptr, rows, own, features, exists,
        d_in, x_stride, encoder_stride, encoder_inner_stride, HAS_SCALE, TOKENS, FEATURES, INNER,
    )  # fmt: skip
    # Zeros and one number add up to that number, whatever it is.
    p = tl.sum(tl.where(own[:, None], tile, 0.0), axis=0)
    negative = tl.zeros([FEATURES], dtype=tl.int32)
    if ABSOLUTE:
        negative = (p < 0).to(tl.int32)
    packed = packed_rank(rank_key(p, ABSOLUTE), features, negative)
    tl.store(candidates_ptr + token * capacity + at, packed, mask=exists)


@triton.jit
def _certify(
    candidates_ptr,
    n_candidates_ptr,
    rest_ptr,
    first_ptr,
    wanted_ptr,
    wanted_tiles_ptr,
    values_ptr,
    features_ptr,
    k,
    capacity,
    asked_ptr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if GATED:  # noqa: SIM102
        if tl.load(asked_ptr + token) == 0:
            tl.store(wanted_ptr + token, 0)
            return
    n_candidates = tl.load(n_candidates_ptr + token)
    at = tl.arange(0, CAPACITY)
    packed = tl.load(candidates_ptr + token * capacity + at, mask=at < n_candidates, other=EMPTY)
    bound = bound_of_first(packed, k)
    certain = (n_candidates >= k) & ((bound >> 32).to(tl.int32) > tl.load(rest_ptr + token))
    tl.store(wanted_ptr + token, 1 - certain.to(tl.int32))
    if certain:
        store_compacted(first_ptr + token * k, packed, bound)
        # What other threads of the program stored is read next.
        tl.debug_barrier()
        _write_in_order(first_ptr + token * k, values_ptr + token * k, features_ptr + token * k, k, SIZE, BLOCK)
    else:
        tl.atomic_max(wanted_tiles_ptr + token // TOKENS, 1)


@dataclass(frozen=True)
class ScreenedTopK:
    """values [tokens, k] float32, features [tokens, k] int64, candidates [tokens] int32: features that were rescored;
    uncertain [tokens] int32: 1 where the whole encoder was read after all."""

    values: torch.Tensor
    features: torch.Tensor
    candidates: torch.Tensor
    uncertain: torch.Tensor


def default_capacity(k: int) -> int:
    """Candidates of a token: ten times k hold what int8 leaves of random rows (benchmarks/kernels/screen.py)."""
    return min(MAX_CANDIDATES, triton.cdiv(10 * k, FEATURES) * FEATURES)


def screen_shape(tokens: int, dtype: torch.dtype, backend: str) -> TileShape:
    """The tile of `_screen_tiles`: the encoder's own, with more warps where float32 would spill."""
    shape = tile_shape(tokens, dtype, backend)
    return replace(shape, warps=8) if backend == "cuda" and dtype == torch.float32 and shape.tokens > 16 else shape


def worth_screening(tokens: int, d_sae: int, k: int) -> bool:
    """Whether a screen can read less than the encoder: few tokens, and far fewer candidates than features."""
    few = tokens <= MAX_TOKENS and tokens * default_capacity(k) < d_sae // 2
    return few and 4 * k <= MAX_CANDIDATES and triton.cdiv(d_sae, FEATURES) <= MAX_KEPT


def encode_topk_screened_triton(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    eight_bit: EightBitEncoder,
    k: int,
    absolute: bool = False,
    scale: torch.Tensor | None = None,
    capacity: int | None = None,
    slots: int | None = None,
    asked: Wanted | None = None,
) -> ScreenedTopK:
    """As `encode_topk_triton`, to the bit, for one pass of tokens and k at most 1024.

    capacity: candidates a token; slots: features that a tile keeps of the screen. Both cost time only. asked: of which
    tokens, in tiles as `tile_shape` has them; the values and features of others are left unwritten.
    """
    if eight_bit.weights.dtype == torch.float8_e4m3fn and not converts_e4m3():
        raise ValueError("float8_e4m3fn needs an NVIDIA GPU of compute capability 8.9 or later: quantise to int8")
    x = row_major(x)
    (n_tokens, d_in), d_sae, device = x.shape, encoder.shape[0], x.device
    n_tiles = triton.cdiv(d_sae, FEATURES)
    capacity = min(d_sae, max(k, default_capacity(k))) if capacity is None else capacity
    slots = min(slots_per_tile(d_sae, capacity), MAX_KEPT // n_tiles) if slots is None else slots
    slots = max(1, slots)
    shape = tile_shape(n_tokens, x.dtype, triton_backend())
    encoded = EncodedTopK(
        values=torch.empty(n_tokens, k, dtype=torch.float32, device=device),
        features=torch.empty(n_tokens, k, dtype=torch.int64, device=device),
        full_tiles=torch.empty(n_tokens, dtype=torch.int32, device=device),
    )
    # These outlive the workspace, which the dense launches have for themselves.
    n_candidates, uncertain = (torch.empty(n_tokens, dtype=torch.int32, device=device) for _ in range(2))
    wanted = Wanted(uncertain, torch.zeros(triton.cdiv(n_tokens, shape.tokens), dtype=torch.int32, device=device))
    if not n_tokens:
        return ScreenedTopK(encoded.values, encoded.features, n_candidates, uncertain)
    kept, lower, candidates, rest, first = workspace.carve(
        device,
        ((n_tokens, n_tiles * slots), torch.int64),
        ((n_tokens, n_tiles * slots), torch.float32),
        ((n_tokens, capacity), torch.int64),
        ((n_tokens,), torch.int32),
        ((n_tokens, k), torch.int64),
    )
    scale_there = b_enc if scale is None else scale
    meta = dict(HAS_SCALE=scale is not None, ABSOLUTE=absolute, FEATURES=FEATURES)
    gated = asked is not None
    asked_tokens, asked_tiles = (asked.tokens, asked.tiles) if asked is not None else (uncertain, uncertain)
    screen = screen_shape(n_tokens, x.dtype, triton_backend())
    _screen_tiles[(triton.cdiv(n_tokens, screen.tokens), n_tiles)](
        x, eight_bit.weights, eight_bit.step, eight_bit.slack, b_enc, scale_there, token_sizes(x, eight_bit, scale),
        kept, lower, n_tokens, d_sae, d_in, x.stride(0), n_tiles, slots, asked_tiles,
        GATED=gated, **meta, **tile_meta(screen),
    )  # fmt: skip
    _choose_candidates[(n_tokens,)](
        kept, lower, candidates, n_candidates, rest, d_sae, n_tiles, slots, k, capacity, asked_tokens,
        GATED=gated, **choose_meta(n_tiles * slots, n_tiles),
    )  # fmt: skip
    _rescore[(n_tokens, triton.cdiv(capacity, FEATURES))](
        x, encoder, b_enc, scale_there, candidates, n_candidates,
        n_tokens, d_in, x.stride(0), *encoder.stride(), capacity, **meta, **tile_meta(shape),
    )  # fmt: skip
    _certify[(n_tokens,)](
        candidates, n_candidates, rest, first, uncertain, wanted.tiles, encoded.values, encoded.features, k, capacity,
        asked_tokens, GATED=gated, TOKENS=shape.tokens, **certify_meta(capacity, k),
    )  # fmt: skip
    one_pass(x, encoder, b_enc, scale, k, absolute, default_slots(d_sae, k), encoded, wanted)
    return ScreenedTopK(encoded.values, encoded.features, n_candidates, uncertain)


def tile_meta(shape: TileShape) -> dict[str, int]:
    return dict(TOKENS=shape.tokens, INNER=shape.inner, num_warps=shape.warps, num_stages=shape.stages)


def choose_meta(n_kept: int, n_tiles: int) -> dict[str, int]:
    """Constants that `_choose_candidates` is compiled with."""
    kept = max(16, triton.next_power_of_2(n_kept))
    return dict(
        KEPT=kept,
        TILES=max(16, triton.next_power_of_2(n_tiles)),
        FEATURES=FEATURES,
        num_warps=min(16, max(4, kept // 1024)),
    )


def certify_meta(capacity: int, k: int) -> dict[str, int]:
    """Constants that `_certify` is compiled with, but for the height of a tile."""
    size = max(16, triton.next_power_of_2(k))
    return dict(
        CAPACITY=max(16, triton.next_power_of_2(capacity)),
        SIZE=size,
        BLOCK=max(4, min(size, 4096 // size)),
        num_warps=4,
    )
