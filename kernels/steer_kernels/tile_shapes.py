"""How the Triton kernels cut [tokens, d_sae] into tiles, and how many features of a tile they keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

FEATURES = 128
"""Features a tile. Also what bounds the cost of running a tile again: d_in * 128 multiplications a token."""

MAX_TOKENS = 2048
"""Tokens of one pass. More are run in several: far past the point where reading the encoder costs nothing beside the
multiplications, and the workspace stays the size of one pass."""

FAILING_ROWS = 1e-4
"""How many rows may need a tile run again, were features independent of their index: costs, never correctness."""


@dataclass(frozen=True)
class TileShape:
    """tokens x FEATURES outputs a program, `inner` of d_in at a time; warps and stages are Triton's."""

    tokens: int
    inner: int
    warps: int
    stages: int


def tile_shape(tokens: int, dtype: torch.dtype, backend: str) -> TileShape:
    """The tile for a batch of `tokens`. backend: "cuda" or "hip", as Triton names them.

    Decode is bound by reading the encoder, so a tile is as tall as the batch (16 at least, which tensor cores want) and
    the depth of the pipeline keeps enough bytes in flight; prefill is bound by multiplications and takes square tiles.
    """
    # float32 has no matrix instruction that keeps its precision, and taller tiles of it spill (kernels_aot.md).
    tallest = 32 if dtype == torch.float32 else 128
    height = next(h for h in (16, 32, 64, 128) if h == tallest or tokens <= h)
    inner = 32 if dtype == torch.float32 else 64
    # AMD's 64 KiB of LDS hold two stages.
    stages = 2 if backend == "hip" else 4 if height < 128 else 3
    return TileShape(height, inner, warps=4 if height < 64 else 8, stages=stages)


@lru_cache
def slots_per_tile(d_sae: int, expected: int) -> int:
    """How many features a tile keeps a token, so that at most FAILING_ROWS of rows with `expected` hits fill a tile.

    A tile is filled when as many hits as it has slots fall into it. Were the hits spread evenly, their number in one of
    n tiles would be binomial(expected, 1 / n); the union bound over tiles is n times its tail.
    """
    n_tiles = math.ceil(d_sae / FEATURES)
    p = 1 / n_tiles
    tail, term = 1.0, (1 - p) ** expected
    for slots in range(1, FEATURES):
        # Here term is P(slots - 1 hits), tail is P(at least slots - 1).
        tail -= term
        if n_tiles * tail <= FAILING_ROWS and slots * n_tiles >= expected:
            return slots
        if p == 1 or slots > expected:
            break
        term *= (expected - slots + 1) / slots * p / (1 - p)
    return min(FEATURES, d_sae)
