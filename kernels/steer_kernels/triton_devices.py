"""Where Triton kernels run; importable without Triton."""

from __future__ import annotations

import os

import torch


def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels take tensors of `device`: on GPUs, and everywhere under Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
