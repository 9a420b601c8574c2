"""AbsTopK SAE (arXiv 2510.00404): the k pre-activations of largest magnitude, with their signs."""

from __future__ import annotations

import torch

from sae_models.activation import Activation
from sae_models.selection import Selection

NAME = "abstopk"
PARAMETERS = ("b_enc",)


def activations(q: torch.Tensor, b_enc: torch.Tensor, k: int) -> torch.Tensor:
    """f [n, d_sae] of q = z @ W_enc [n, d_sae]."""
    pre_acts = q + b_enc
    top = pre_acts.abs().topk(k, dim=-1).indices
    return torch.zeros_like(pre_acts).scatter(-1, top, pre_acts.gather(-1, top))


def canonical(b_enc: torch.Tensor, k: int, rescale_by_decoder_norm: bool = False) -> Activation:
    """rescale_by_decoder_norm: as for TopK."""
    bias = b_enc.double()
    return Activation(
        bias,
        torch.full_like(bias, -torch.inf),
        selection=Selection(k, absolute=True),
        rescale_by_decoder_norm=rescale_by_decoder_norm,
    )
