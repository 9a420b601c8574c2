"""The custom op, which runs where its tensors are."""

from __future__ import annotations

import torch

from steer_kernels.count_above.torch_path import count_above_torch
from steer_kernels.pre_activations import check_encoder


def check_given(x: torch.Tensor, features: torch.Tensor) -> None:
    """Raise ValueError where features cannot be what each token of x asks for."""
    if features.ndim != 2 or len(features) != len(x) or features.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"features must be [{len(x)}, n] int32 or int64, not {list(features.shape)} {features.dtype}")


def _check(
    x: torch.Tensor, encoder: torch.Tensor, b_enc: torch.Tensor, features: torch.Tensor, scale: torch.Tensor | None
) -> None:
    check_encoder(x, encoder, b_enc, scale)
    check_given(x, features)


def _count_above_cpu(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    features: torch.Tensor,
    floor: float,
    absolute: bool,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, encoder, b_enc, features, scale)
    return count_above_torch(x, encoder, b_enc, features, floor, absolute, scale)


def _count_above_gpu(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    features: torch.Tensor,
    floor: float,
    absolute: bool,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Machines without a GPU need no Triton.
    from steer_kernels.count_above.triton_kernel import count_above_triton

    _check(x, encoder, b_enc, features, scale)
    return count_above_triton(x, encoder, b_enc, features, floor, absolute, scale)


def _count_above_fake(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    features: torch.Tensor,
    floor: float,
    absolute: bool,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(features.shape, dtype=torch.float32), x.new_empty(features.shape, dtype=torch.int32)


_library = torch.library.Library("steer_kernels", "FRAGMENT")
_library.define(
    "count_above(Tensor x, Tensor encoder, Tensor b_enc, Tensor features, float floor, bool absolute, Tensor? scale)"
    " -> (Tensor, Tensor)"
)
_library.impl("count_above", _count_above_cpu, "CPU")
_library.impl("count_above", _count_above_gpu, "CUDA")
torch.library.register_fake("steer_kernels::count_above", _count_above_fake, lib=_library)

count_above = torch.ops.steer_kernels.count_above
"""count_above(x, encoder, b_enc, features, floor, absolute, scale): as `count_above_reference`, p in float32.

Features must be below d_sae: they are not checked, which would wait for the device.
"""
