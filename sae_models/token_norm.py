"""Norms that an SAE divides each token by. They depend on the token, so they cannot be folded into rows."""

from __future__ import annotations

from typing import Literal

import torch

TokenNorm = Literal["none", "layer_norm", "constant_norm"]

EPSILON = 1e-5
"""Added to the standard deviation itself, not to the variance (SAELens `sae.py`, OpenAI's sparse_autoencoder)."""


def centred(rows: torch.Tensor, norm: TokenNorm) -> torch.Tensor:
    """Encoder rows [n, d] that read x as the given ones read x - mean(x), where the norm takes the mean off."""
    return rows - rows.mean(-1, keepdim=True) if norm == "layer_norm" else rows


def token_scales(x: torch.Tensor, norm: TokenNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, s), each [n, 1], of tokens x [n, d]: what the input is multiplied by, and what the output is.

    `layer_norm`: 1 / (std + 1e-5) and std, with Bessel's correction. `constant_norm`: sqrt(d) / |x| and its inverse.
    A token of zeros has a finite a and s = 0.
    """
    if norm == "layer_norm":
        std = x.std(-1, keepdim=True)
        return 1 / (std + EPSILON), std
    if norm == "constant_norm":
        size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return 1 / size.clamp(min=torch.finfo(x.dtype).tiny), size
    one = torch.ones_like(x[..., :1])
    return one, one
