"""decode_sparse on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

GATHERED = 1 << 20
"""Numbers of half-precision decoder rows that are widened at once."""


def decode_sparse_torch(
    features: torch.Tensor,
    values: torch.Tensor,
    decoder: torch.Tensor,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    base: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `decode_sparse_reference`, added up in float32."""
    padding = features < 0
    rows, weights = features.clamp(min=0), values.float().masked_fill(padding, 0.0)
    if decoder.dtype == torch.float32:
        total = F.embedding_bag(rows, decoder, mode="sum", per_sample_weights=weights)
    else:
        # embedding_bag would add up in the decoder's precision.
        total = torch.empty(len(features), decoder.shape[1])
        step = max(1, GATHERED // max(1, features.shape[1] * decoder.shape[1]))
        for start in range(0, len(features), step):
            part = slice(start, start + step)
            total[part] = torch.bmm(weights[part].unsqueeze(1), decoder[rows[part]].float()).squeeze(1)
    if b_dec is not None:
        total += b_dec.float()
    if scale is not None:
        total *= scale.unsqueeze(-1)
    if base is not None:
        total += base.float()
    return total.to(dtype)
