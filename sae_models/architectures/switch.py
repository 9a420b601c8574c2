"""Switch SAE (Mudide et al. 2024, arXiv 2410.08201): a router picks one expert, a TopK SAE over its own features.

f = P(expert) * TopK(ReLU(q + b_enc)) on the expert's features, with P = softmax(scores); one decoder for all.
"""

from __future__ import annotations

import torch

from sae_models.activation import Activation
from sae_models.selection import Selection

NAME = "switch"
PARAMETERS = ("b_enc",)


def activations(q: torch.Tensor, b_enc: torch.Tensor, k: int, scores: torch.Tensor) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae] and the router's scores [n, experts]."""
    n, d_sae = q.shape
    probabilities = scores.softmax(-1)
    p, expert = probabilities.max(-1)
    acts = torch.relu(q + b_enc).reshape(n, scores.shape[1], -1)
    rows = torch.arange(n)
    chosen = acts[rows, expert]
    top = chosen.topk(k, dim=-1)
    out = torch.zeros_like(acts)
    out[rows, expert] = torch.zeros_like(chosen).scatter(-1, top.indices, top.values) * p.unsqueeze(-1)
    return out.reshape(n, d_sae)


def canonical(b_enc: torch.Tensor, k: int, experts: int) -> Activation:
    bias = b_enc.double()
    return Activation(bias, torch.zeros_like(bias), selection=Selection(k, groups=experts, routed=True))
