"""The custom op, which runs where its tensors are."""

from __future__ import annotations

import torch

from steer_kernels.eight_bit import EightBitEncoder, check_eight_bit
from steer_kernels.encode_topk import encode_topk
from steer_kernels.pre_activations import check_encoder, check_k


def _checked(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    eight_bit: EightBitEncoder,
    k: int,
    scale: torch.Tensor | None,
) -> None:
    check_encoder(x, encoder, b_enc, scale)
    check_eight_bit(eight_bit, encoder)
    check_k(k, encoder.shape[0])


def _encode_topk_screened_cpu(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    weights: torch.Tensor,
    step: torch.Tensor,
    slack: torch.Tensor,
    longest: torch.Tensor,
    k: int,
    absolute: bool,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the screen, which changes no result: a CPU would have to widen eight bits before it multiplies."""
    _checked(x, encoder, b_enc, EightBitEncoder(weights, step, slack, longest), k, scale)
    return encode_topk(x, encoder, b_enc, k, absolute, scale)


def _encode_topk_screened_gpu(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    weights: torch.Tensor,
    step: torch.Tensor,
    slack: torch.Tensor,
    longest: torch.Tensor,
    k: int,
    absolute: bool,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Machines without a GPU need no Triton.
    from steer_kernels.encode_topk_screened.triton_kernel import encode_topk_screened_triton, worth_screening

    eight_bit = EightBitEncoder(weights, step, slack, longest)
    _checked(x, encoder, b_enc, eight_bit, k, scale)
    if worth_screening(x.shape[0], encoder.shape[0], k):
        screened = encode_topk_screened_triton(x, encoder, b_enc, eight_bit, k, absolute, scale)
        return screened.values, screened.features
    return encode_topk(x, encoder, b_enc, k, absolute, scale)


def _encode_topk_screened_fake(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    weights: torch.Tensor,
    step: torch.Tensor,
    slack: torch.Tensor,
    longest: torch.Tensor,
    k: int,
    absolute: bool,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


_library = torch.library.Library("steer_kernels", "FRAGMENT")
_library.define(
    "encode_topk_screened(Tensor x, Tensor encoder, Tensor b_enc, Tensor weights, Tensor step, Tensor slack,"
    " Tensor longest, int k, bool absolute, Tensor? scale) -> (Tensor, Tensor)"
)
_library.impl("encode_topk_screened", _encode_topk_screened_cpu, "CPU")
_library.impl("encode_topk_screened", _encode_topk_screened_gpu, "CUDA")
torch.library.register_fake("steer_kernels::encode_topk_screened", _encode_topk_screened_fake, lib=_library)

encode_topk_screened = torch.ops.steer_kernels.encode_topk_screened
"""encode_topk_screened(x, encoder, b_enc, weights, step, slack, longest, k, absolute, scale): as `encode_topk`, with
the four tensors of the `EightBitEncoder` that `steer_kernels.eight_bit.quantise` made of the encoder.

Batches of more tokens than a screen pays for are encoded without."""
