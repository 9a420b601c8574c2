"""The custom op, which runs where its tensors are."""

from __future__ import annotations

import torch

from steer_kernels.count_above import count_above
from steer_kernels.count_above.op import check_given
from steer_kernels.eight_bit import EightBitEncoder, check_eight_bit
from steer_kernels.pre_activations import check_encoder, check_k


def _count_above_screened_cpu(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    weights: torch.Tensor,
    step: torch.Tensor,
    slack: torch.Tensor,
    longest: torch.Tensor,
    features: torch.Tensor,
    k: int,
    floor: float,
    absolute: bool,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the screen, which changes no result: a CPU would have to widen eight bits before it multiplies."""
    _check(x, encoder, b_enc, EightBitEncoder(weights, step, slack, longest), features, k, scale)
    return _unscreened(x, encoder, b_enc, features, k, floor, absolute, scale)


def _count_above_screened_gpu(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    weights: torch.Tensor,
    step: torch.Tensor,
    slack: torch.Tensor,
    longest: torch.Tensor,
    features: torch.Tensor,
    k: int,
    floor: float,
    absolute: bool,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Machines without a GPU need no Triton.
    from steer_kernels.count_above_screened.triton_kernel import count_above_screened_triton
    from steer_kernels.encode_topk_screened.triton_kernel import worth_screening

    eight_bit = EightBitEncoder(weights, step, slack, longest)
    _check(x, encoder, b_enc, eight_bit, features, k, scale)
    if worth_screening(x.shape[0], encoder.shape[0], k):
        counted = count_above_screened_triton(x, encoder, b_enc, eight_bit, features, k, floor, absolute, scale)
        return counted.p, counted.ahead
    return _unscreened(x, encoder, b_enc, features, k, floor, absolute, scale)


def _check(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    eight_bit: EightBitEncoder,
    features: torch.Tensor,
    k: int,
    scale: torch.Tensor | None,
) -> None:
    check_encoder(x, encoder, b_enc, scale)
    check_eight_bit(eight_bit, encoder)
    check_given(x, features)
    check_k(k, encoder.shape[0])


def _unscreened(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    features: torch.Tensor,
    k: int,
    floor: float,
    absolute: bool,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    p, ahead = count_above(x, encoder, b_enc, features, floor, absolute, scale)
    return p, ahead.clamp_(max=k)


def _count_above_screened_fake(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    weights: torch.Tensor,
    step: torch.Tensor,
    slack: torch.Tensor,
    longest: torch.Tensor,
    features: torch.Tensor,
    k: int,
    floor: float,
    absolute: bool,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(features.shape, dtype=torch.float32), x.new_empty(features.shape, dtype=torch.int32)


_library = torch.library.Library("steer_kernels", "FRAGMENT")
_library.define(
    "count_above_screened(Tensor x, Tensor encoder, Tensor b_enc, Tensor weights, Tensor step, Tensor slack,"
    " Tensor longest, Tensor features, int k, float floor, bool absolute, Tensor? scale) -> (Tensor, Tensor)"
)
_library.impl("count_above_screened", _count_above_screened_cpu, "CPU")
_library.impl("count_above_screened", _count_above_screened_gpu, "CUDA")
torch.library.register_fake("steer_kernels::count_above_screened", _count_above_screened_fake, lib=_library)

count_above_screened = torch.ops.steer_kernels.count_above_screened
"""count_above_screened(x, encoder, b_enc, weights, step, slack, longest, features, k, floor, absolute, scale): as
`count_above`, with the four tensors of the `EightBitEncoder` that `steer_kernels.eight_bit.quantise` made of the
encoder; ahead is at most k.

Batches of more tokens than a screen pays for are counted without."""
