"""One layer of a cross-layer transcoder (Ameisen et al. 2025, "Circuit Tracing"), writing to its own layer only.

A feature of the whole writes to the MLP output of every layer from its own onwards, along a row for each. Used as a
transcoder, an edit of it changes its own layer; what the later layers would get of it is left out.
"""

from __future__ import annotations

import torch

from sae_models.architectures import transcoder

NAME = "clt_own_layer"


def reconstruction(activations: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
    """[n, d_out] from activations [n, d_sae], W_dec [d_sae, layers from its own onwards, d_out] and b_dec [d_out]."""
    return transcoder.reconstruction(activations, W_dec[:, 0], b_dec)
