"""TopK SAE (Gao et al. 2024, arXiv 2406.04093): ReLU of the k largest pre-activations of a token."""

from __future__ import annotations

import torch

from sae_models.activation import Activation
from sae_models.selection import Selection

NAME = "topk"
PARAMETERS = ("b_enc",)


def activations(q: torch.Tensor, b_enc: torch.Tensor, k: int) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae]."""
    pre_acts = q + b_enc
    top = pre_acts.topk(k, dim=-1)
    return torch.zeros_like(pre_acts).scatter(-1, top.indices, torch.relu(top.values))


def canonical(b_enc: torch.Tensor, k: int, rescale_by_decoder_norm: bool = False) -> Activation:
    """rescale_by_decoder_norm: rank by, and return, pre-activations times decoder norms (SAELens `topk_sae.py`)."""
    bias = b_enc.double()
    return Activation(
        bias, torch.zeros_like(bias), selection=Selection(k), rescale_by_decoder_norm=rescale_by_decoder_norm
    )
