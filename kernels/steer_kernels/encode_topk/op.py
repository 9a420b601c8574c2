"""The custom op, which runs where its tensors are."""

from __future__ import annotations

import torch

from steer_kernels.encode_topk.torch_path import encode_topk_torch
from steer_kernels.pre_activations import check_encoder, check_k


def _checked(x: torch.Tensor, encoder: torch.Tensor, b_enc: torch.Tensor, k: int, scale: torch.Tensor | None) -> None:
    check_encoder(x, encoder, b_enc, scale)
    check_k(k, encoder.shape[0])


def _encode_topk_cpu(
    x: torch.Tensor, encoder: torch.Tensor, b_enc: torch.Tensor, k: int, absolute: bool, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _checked(x, encoder, b_enc, k, scale)
    return encode_topk_torch(x, encoder, b_enc, k, absolute, scale)


def _encode_topk_gpu(
    x: torch.Tensor, encoder: torch.Tensor, b_enc: torch.Tensor, k: int, absolute: bool, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    # Machines without a GPU need no Triton.
    from steer_kernels.encode_topk.triton_kernel import encode_topk_triton

    _checked(x, encoder, b_enc, k, scale)
    encoded = encode_topk_triton(x, encoder, b_enc, k, absolute, scale)
    return encoded.values, encoded.features


def _encode_topk_fake(
    x: torch.Tensor, encoder: torch.Tensor, b_enc: torch.Tensor, k: int, absolute: bool, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


_library = torch.library.Library("steer_kernels", "FRAGMENT")
_library.define(
    "encode_topk(Tensor x, Tensor encoder, Tensor b_enc, int k, bool absolute, Tensor? scale) -> (Tensor, Tensor)"
)
_library.impl("encode_topk", _encode_topk_cpu, "CPU")
_library.impl("encode_topk", _encode_topk_gpu, "CUDA")
torch.library.register_fake("steer_kernels::encode_topk", _encode_topk_fake, lib=_library)


def encode_topk(
    x: torch.Tensor, encoder: torch.Tensor, b_enc: torch.Tensor, k: int, absolute: bool, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode_topk_reference`, with p in float32."""
    if type(x) is torch.Tensor and x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # One token's way to Python and back through torch's dispatcher takes longer than the choice of its features.
        return _encode_topk_cpu(x, encoder, b_enc, k, absolute, scale)
    return torch.ops.steer_kernels.encode_topk(x, encoder, b_enc, k, absolute, scale)
