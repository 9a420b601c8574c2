"""GroupMax (EleutherAI `sparsify`): of each of k consecutive groups of features, ReLU of the largest."""

from __future__ import annotations

import torch

from sae_models.activation import Activation
from sae_models.selection import Selection

NAME = "groupmax"
PARAMETERS = ("b_enc",)


def activations(q: torch.Tensor, b_enc: torch.Tensor, k: int) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae]; k groups of d_sae / k features."""
    n, d_sae = q.shape
    acts = torch.relu(q + b_enc).reshape(n, k, d_sae // k)
    largest = acts.max(dim=-1, keepdim=True)
    return torch.zeros_like(acts).scatter(-1, largest.indices, largest.values).reshape(n, d_sae)


def canonical(b_enc: torch.Tensor, k: int) -> Activation:
    bias = b_enc.double()
    return Activation(bias, torch.zeros_like(bias), selection=Selection(1, groups=k))
