"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): f = 1[q + b_gate > 0] * ReLU(q exp(r_mag) + b_mag).

Gate and magnitude read along the same row, so the gate is a threshold on the magnitude:
q + b_gate > 0  where  q exp(r_mag) + b_mag > b_mag - b_gate exp(r_mag).
"""

from __future__ import annotations

import torch

from sae_models.activation import Activation

NAME = "gated"
PARAMETERS = ("b_gate", "r_mag", "b_mag")


def activations(q: torch.Tensor, b_gate: torch.Tensor, r_mag: torch.Tensor, b_mag: torch.Tensor) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae]."""
    return (q + b_gate > 0) * torch.relu(q * r_mag.exp() + b_mag)


def canonical(b_gate: torch.Tensor, r_mag: torch.Tensor, b_mag: torch.Tensor) -> Activation:
    gain, bias = r_mag.double().exp(), b_mag.double()
    return Activation(bias, (bias - b_gate.double() * gain).clamp(min=0.0), gain)
