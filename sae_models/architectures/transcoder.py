"""Transcoder (Dunefsky et al. 2024, arXiv 2406.11944): reads an MLP's input and writes what stands for its output.

Its encoder is that of a ReLU, JumpReLU or TopK SAE; b_dec has the output's width and is not taken from the input.
"""

from __future__ import annotations

import torch

NAME = "transcoder"


def reconstruction(activations: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
    """[n, d_out] from activations [n, d_sae], W_dec [d_sae, d_out] and b_dec [d_out]."""
    return activations @ W_dec + b_dec
