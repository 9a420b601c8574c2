"""count_above on a CPU."""

from __future__ import annotations

import torch

from steer_kernels.blocks import pre_activation_blocks


def count_above_torch(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    features: torch.Tensor,
    floor: float,
    absolute: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `count_above_reference`, with p in float32."""
    d_sae = encoder.shape[0]
    asked = features >= 0
    rows = features.long().clamp(min=0)
    p = torch.zeros(features.shape)
    ahead = torch.full(features.shape, d_sae, dtype=torch.int32)
    needed = asked.any(-1).nonzero().squeeze(-1)
    for chunk in needed.split(max(1, _GATHERED // max(1, features.shape[1] * x.shape[1]))):
        given = encoder[rows[chunk]].float()
        products = torch.einsum("tnd,td->tn", given, x[chunk].float())
        if scale is not None:
            products *= scale[chunk].unsqueeze(-1)
        p[chunk] = torch.where(asked[chunk], products + b_enc[rows[chunk]], 0.0)
    above = asked & ((p.abs() if absolute else p) > floor)
    # Only tokens with something to rank need the whole encoder, which on most steps are few.
    tokens = above.any(-1).nonzero().squeeze(-1)
    part_scale = None if scale is None else scale[tokens]
    for part, pre_acts in pre_activation_blocks(x[tokens], encoder, b_enc, part_scale):
        block = tokens[part]
        own = pre_acts.gather(-1, rows[block])
        # One p a feature, from one product: another order of sums could put it before or behind its own value.
        p[block] = torch.where(above[block], own, p[block])
        ranked = pre_acts.abs() if absolute else pre_acts
        for column in range(features.shape[1]):
            counted = above[block, column]
            if bool(counted.any()):
                ahead[block, column] = torch.where(
                    counted, _ahead(ranked, rows[block, column], counted), ahead[block, column]
                )
    return p, ahead


_GATHERED = 1 << 22
"""Numbers of encoder rows that are gathered at once."""


def _ahead(ranked: torch.Tensor, feature: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """How many of ranked [n, d_sae] come before `feature` [n], int32. NaN compares as neither more nor equal."""
    size = ranked.gather(-1, feature.unsqueeze(-1))
    ahead = (ranked > size).sum(-1)
    tied = ranked == size
    for token in (counted & (tied.sum(-1) > 1)).nonzero().squeeze(-1).tolist():
        ahead[token] += tied[token, : feature[token]].sum()
    return ahead.int()
