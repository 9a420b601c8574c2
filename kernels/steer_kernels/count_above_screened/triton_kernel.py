"""count_above on a GPU with half the bytes, for membership among the k first. None of the launches waits for the host:

1. `given_features`: p of each token's own features from the encoder's rows, and which tokens have one to rank.
2. The launches of encode_topk_screened for those tokens, which find their k first features: an eight-bit screen, exact
   sums of what passes it, a certificate, and the whole encoder where that fails. Other tokens read nothing of either.
3. `_place_given`: the place of each given feature among the k first is how many are ahead of it; what is not there has
   k or more.

Counting with the copy alone would not do: a given feature that is among the k first may be nearer to some feature
around it than the copy's bound, which leaves its count open, without being anywhere near the border of the k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from steer_kernels.count_above.triton_kernel import MAX_GIVEN, given_features, to_rank_pieces
from steer_kernels.eight_bit import EightBitEncoder
from steer_kernels.encode_topk_screened.triton_kernel import encode_topk_screened_triton
from steer_kernels.pre_activations import row_major
from steer_kernels.wanted import Wanted

PLACES = 16
"""Places of the k first that are compared with all given features at once."""


@triton.jit(do_not_specialize=["given_stride", "n_given"])
def _place_given(
    given_ptr,
    ahead_ptr,
    features_ptr,
    to_rank_ptr,
    given_stride,
    n_given,
    k,
    GIVEN: tl.constexpr,
    PLACES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, GIVEN)
    exists = at < n_given
    ahead = tl.load(ahead_ptr + token * n_given + at, mask=exists, other=1)
    place = tl.zeros([GIVEN], dtype=tl.int32) + k
    if tl.load(to_rank_ptr + token) != 0:
        given = tl.load(given_ptr + token * given_stride + at, mask=exists, other=-1)
        for start in range(0, k, PLACES):
            places = start + tl.arange(0, PLACES)
            first = tl.load(features_ptr + token * k + places, mask=places < k, other=-1)
            here = (first[None, :] == given[:, None]) & (places < k)[None, :]
            place = tl.minimum(place, tl.min(tl.where(here, places[None, :], k), axis=1))
    tl.store(ahead_ptr + token * n_given + at, tl.where(ahead == 0, place, k), mask=exists)


@dataclass(frozen=True)
class CountedAbove:
    """p [tokens, n] float32, ahead [tokens, n] int32, at most k; ranked [tokens] int32: 1 where one was to be ranked;
    uncertain [tokens] int32: 1 where the whole encoder was read after all."""

    p: torch.Tensor
    ahead: torch.Tensor
    ranked: torch.Tensor
    uncertain: torch.Tensor


def count_above_screened_triton(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    eight_bit: EightBitEncoder,
    features: torch.Tensor,
    k: int,
    floor: float,
    absolute: bool = False,
    scale: torch.Tensor | None = None,
    capacity: int | None = None,
) -> CountedAbove:
    """As `count_above_triton` with ahead cut off at k, for one pass of tokens, 128 features a token and k at most 1024.

    capacity: as `encode_topk_screened_triton` has it.
    """
    (n_tokens, n_given), x, features = features.shape, row_major(x), row_major(features)
    if n_given > MAX_GIVEN:
        raise ValueError(f"features must be at most {MAX_GIVEN} a token, not {n_given}")
    p = torch.empty(n_tokens, n_given, dtype=torch.float32, device=x.device)
    # The screen has the workspace for itself: what must outlive it is allocated. One by one: Triton compiles a kernel
    # for pointers that begin on 16 bytes and another for those that do not.
    ahead, keys = (torch.empty(n_tokens, n_given, dtype=torch.int32, device=x.device) for _ in range(2))
    to_rank = Wanted(
        *(torch.empty(size, dtype=dtype, device=x.device) for size, dtype in to_rank_pieces(n_tokens, x.dtype))
    )
    if not n_tokens or not n_given:
        return CountedAbove(p, ahead, to_rank.tokens.zero_(), to_rank.tokens)
    given_features(x, encoder, b_enc, features, floor, absolute, scale, p, ahead, keys, to_rank)
    screened = encode_topk_screened_triton(
        x, encoder, b_enc, eight_bit, k, absolute, scale, capacity=capacity, asked=to_rank
    )
    _place_given[(n_tokens,)](
        features, ahead, screened.features, to_rank.tokens, features.stride(0), n_given, k,
        GIVEN=max(16, triton.next_power_of_2(n_given)), PLACES=PLACES, num_warps=4,
    )  # fmt: skip
    return CountedAbove(p, ahead, to_rank.tokens, screened.uncertain)
