"""BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410): trained on the largest of a batch, JumpReLU at inference.

The one threshold of all features is the running mean of the smallest activation that training kept.
"""

from __future__ import annotations

import torch

from sae_models.activation import Activation
from sae_models.architectures import jumprelu

NAME = "batchtopk"
PARAMETERS = ("b_enc",)


def activations(q: torch.Tensor, b_enc: torch.Tensor, threshold: float) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae]."""
    acts = torch.relu(q + b_enc)
    return acts * (acts > threshold)


def canonical(b_enc: torch.Tensor, threshold: float) -> Activation:
    return jumprelu.canonical(b_enc, torch.full_like(b_enc, threshold, dtype=torch.float64))
