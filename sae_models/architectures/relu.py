"""ReLU SAE (Bricken et al. 2023, "Towards Monosemanticity"): f = ReLU(q + b_enc)."""

from __future__ import annotations

import torch

from sae_models.activation import Activation

NAME = "relu"
PARAMETERS = ("b_enc",)


def activations(q: torch.Tensor, b_enc: torch.Tensor) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae]."""
    return torch.relu(q + b_enc)


def canonical(b_enc: torch.Tensor) -> Activation:
    return Activation(b_enc.double(), torch.zeros_like(b_enc, dtype=torch.float64))
