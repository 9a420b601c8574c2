"""Skip transcoder (Paulo et al. 2025, arXiv 2501.18823): a transcoder with a linear path from input to output.

The path is the same whatever the features are, so an edit of a feature does not depend on it.
"""

from __future__ import annotations

import torch

from sae_models.architectures import transcoder

NAME = "skip_transcoder"


def reconstruction(
    activations: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor, x: torch.Tensor, W_skip: torch.Tensor
) -> torch.Tensor:
    """[n, d_out] from activations [n, d_sae] of inputs x [n, d_in]; W_skip [d_out, d_in]."""
    return transcoder.reconstruction(activations, W_dec, b_dec) + x @ W_skip.T
