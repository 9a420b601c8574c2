"""Hierarchical TopK SAE (Balagansky et al. 2025, arXiv 2505.24473): one set of weights, any k up to the trained one."""

from __future__ import annotations

import torch

from sae_models.activation import Activation
from sae_models.architectures import topk

NAME = "hierarchical_topk"
PARAMETERS = ("b_enc",)


def activations(q: torch.Tensor, b_enc: torch.Tensor, k: int) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae]."""
    return topk.activations(q, b_enc, k)


def canonical(b_enc: torch.Tensor, k: int) -> Activation:
    return topk.canonical(b_enc, k)
