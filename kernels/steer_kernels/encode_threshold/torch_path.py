"""encode_threshold on a CPU."""

from __future__ import annotations

import torch

from steer_kernels.blocks import pre_activation_blocks


def encode_threshold_torch(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    threshold: torch.Tensor,
    capacity: int,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `encode_threshold_reference`, with p in float32."""
    values = torch.zeros(x.shape[0], capacity)
    features = torch.full((x.shape[0], capacity), -1)
    counts = torch.zeros(x.shape[0], dtype=torch.int32)
    for tokens, pre_acts in pre_activation_blocks(x, encoder, b_enc, scale):
        # nonzero goes through rows in order, and through features in order within each.
        token, feature = (pre_acts > threshold).nonzero(as_tuple=True)
        found = torch.bincount(token, minlength=len(pre_acts))
        place = torch.arange(len(token)) - (found.cumsum(0) - found)[token]
        fits = place < capacity
        token, feature, place = token[fits], feature[fits], place[fits]
        values[tokens][token, place] = pre_acts[token, feature]
        features[tokens][token, place] = feature
        counts[tokens] = found.int()
    return values, features, counts
