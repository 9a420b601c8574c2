"""Matryoshka BatchTopK SAE (Bussmann et al. 2025, arXiv 2503.17547): nested dictionaries, one threshold at inference.

A number of active groups below all of them leaves out the features of the others.
"""

from __future__ import annotations

import torch

from sae_models.activation import Activation

NAME = "matryoshka"
PARAMETERS = ("b_enc",)


def activations(
    q: torch.Tensor, b_enc: torch.Tensor, threshold: float, group_sizes: list[int], active_groups: int
) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae]."""
    acts = torch.relu(q + b_enc)
    acts = acts * (acts > threshold)
    acts[..., sum(group_sizes[:active_groups]) :] = 0
    return acts


def canonical(b_enc: torch.Tensor, threshold: float, group_sizes: list[int], active_groups: int) -> Activation:
    thresholds = torch.full_like(b_enc, max(threshold, 0.0), dtype=torch.float64)
    thresholds[sum(group_sizes[:active_groups]) :] = torch.inf
    return Activation(b_enc.double(), thresholds)
