"""The one form that every architecture's activation function has at inference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sae_models.selection import Selection


@dataclass(frozen=True)
class Activation:
    """p_i = gain_i * (z @ W_enc)_i + bias_i of an input z; f_i = p_i over threshold_i if `selection` keeps it, else 0.

    bias, threshold, gain: [d_sae] float64 (gain None: 1).
    rescale_by_decoder_norm: features are ranked by, and their activations are, pre-activations times the norm of their
        decoder rows (SAELens `topk_sae.py`); the rows that edits get are divided by it.
    """

    bias: torch.Tensor
    threshold: torch.Tensor
    gain: torch.Tensor | None = None
    selection: Selection | None = None
    rescale_by_decoder_norm: bool = False
