"""Token norms in torch operations."""

from __future__ import annotations

import torch

from steer_kernels.apply_edits.edits import LAYER_NORM_EPS, SMALLEST_NORM, TokenNorm


def scaled(x: torch.Tensor, norm: TokenNorm) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(a * x, s) of streams x [tokens, d_model]; s [tokens], None for ones."""
    if norm is TokenNorm.NONE:
        return x, None
    if norm is TokenNorm.LAYER_NORM:
        s = x.std(dim=-1)
        return x / (s + LAYER_NORM_EPS).unsqueeze(-1), s
    length, root = torch.linalg.vector_norm(x, dim=-1), x.shape[-1] ** 0.5
    return x * (root / length.clamp(min=SMALLEST_NORM)).unsqueeze(-1), length / root
