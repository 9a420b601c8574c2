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
        products = torch.linalg.vecdot(given, x[chunk].float().unsqueeze(1))
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
        found = features_ahead(ranked, rows[block], above[block])
        ahead[block] = torch.where(above[block], found, ahead[block])
    return p, ahead


_GATHERED = 1 << 22
"""Numbers of encoder rows that are gathered at once."""


_COMPARED = 1 << 20
"""Comparisons at once: their results fit a core's cache."""


def features_ahead(ranked: torch.Tensor, features: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """How many of ranked [n, d_sae] come before each of features [n, m] of its row, int32.

    counted [n, m]: those that are asked for (default: all); the others come out as anything. NaN compares as neither
    more nor equal, so that it comes after everything.
    """
    (n, d_sae), m = ranked.shape, features.shape[1]
    ahead = torch.empty(features.shape, dtype=torch.int32, device=ranked.device)
    if ranked.device.type == "cpu" and ranked.dtype == torch.float32:
        # It is compiled when it is imported: not on machines that have no use for it.
        from steer_kernels.cpu_ranks import count_ahead

        count_ahead(ranked, features, counted, ahead)
        return ahead
    step = max(1, _COMPARED // max(1, m * d_sae))
    for start in range(0, n, step):
        part = slice(start, start + step)
        size, others = ranked[part].gather(-1, features[part]).unsqueeze(-1), ranked[part].unsqueeze(1)
        more = (others > size).sum(-1, dtype=torch.int32)
        tied = (others >= size).sum(-1, dtype=torch.int32) - more > 1
        ahead[part] = more
        if counted is not None:
            tied &= counted[part]
        for token, column in tied.nonzero().tolist():
            lower = ranked[start + token, : features[start + token, column]]
            ahead[start + token, column] += (lower == size[token, column]).sum()
    return ahead
