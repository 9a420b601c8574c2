"""ProLU SAE (Taggart 2024): f = q where q > 0 and q + b_enc > 0. The bias decides and is not added."""

from __future__ import annotations

import torch

from sae_models.activation import Activation

NAME = "prolu"
PARAMETERS = ("b_enc",)


def activations(q: torch.Tensor, b_enc: torch.Tensor) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae]."""
    return torch.where((q > 0) & (q + b_enc > 0), q, 0.0)


def canonical(b_enc: torch.Tensor) -> Activation:
    threshold = (-b_enc.double()).clamp(min=0.0)
    return Activation(torch.zeros_like(threshold), threshold)
