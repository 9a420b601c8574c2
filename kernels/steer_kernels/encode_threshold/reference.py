"""The oracle: compare all float64 pre-activations with their thresholds."""

from __future__ import annotations

import torch

from steer_kernels.pre_activations import pre_activations_reference


def encode_threshold_reference(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    threshold: torch.Tensor,
    capacity: int,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(p [tokens, capacity] float64, features [tokens, capacity] int64, counts [tokens] int32) of active features.

    A feature is active where p > threshold [d_sae], which NaN is not. A token's active features stand in ascending
    order; places past the last one hold p = 0 and feature -1. counts has how many are active, even where that is more
    than `capacity` and the lists hold the lowest ones only.
    """
    pre_acts = pre_activations_reference(x, encoder, b_enc, scale)
    values = torch.zeros(x.shape[0], capacity, dtype=torch.float64)
    features = torch.full((x.shape[0], capacity), -1)
    active = pre_acts > threshold.double()
    for token in range(x.shape[0]):
        found = active[token].nonzero().squeeze(-1)[:capacity]
        features[token, : len(found)] = found
        values[token, : len(found)] = pre_acts[token, found]
    return values, features, active.sum(-1).int()
