"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435): f = p where p = q + b_enc exceeds the threshold.

The value is p, not p - threshold, and a pre-activation that equals the threshold is off.
"""

from __future__ import annotations

import torch

from sae_models.activation import Activation

NAME = "jumprelu"
PARAMETERS = ("b_enc", "threshold")


def activations(q: torch.Tensor, b_enc: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae]."""
    pre_acts = q + b_enc
    return torch.relu(pre_acts) * (pre_acts > threshold)


def canonical(b_enc: torch.Tensor, threshold: torch.Tensor) -> Activation:
    # ReLU comes first, so a threshold below zero is a threshold of zero.
    return Activation(b_enc.double(), threshold.double().clamp(min=0.0))
