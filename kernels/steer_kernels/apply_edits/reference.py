"""The oracle: the definition, one token and one row at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steer_kernels.apply_edits.edits import SiteEdits, TopKEncoder, stream_limit


def is_topk_member(pre_acts: torch.Tensor, feature: int, k: int) -> bool:
    """Whether `feature` is among the k largest of pre_acts [d_sae]; equal values go to the lower index."""
    value = pre_acts[feature]
    ahead = int((pre_acts > value).sum()) + int((pre_acts[:feature] == value).sum())
    return ahead < k


def apply_edits_reference(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    edits: SiteEdits,
    encoders: Sequence[TopKEncoder] = (),
) -> torch.Tensor:
    """Return the new `hidden`, float64, such that new hidden + residual is the edited residual stream.

    hidden, residual: [tokens, d_model], the stream being their sum (residual None: hidden alone).
    rows: [capacity, d_model], the row bank.
    """
    stream = hidden.double() if residual is None else hidden.double() + residual.double()
    edited = stream.clone()
    keep_norm: set[int] = set()
    for e in range(len(edits)):
        for token in range(int(edits.start[e]), int(edits.stop[e])):
            f = 0.0
            if edits.read[e] >= 0:
                p = float(stream[token] @ rows[int(edits.read[e])].double()) + float(edits.bias[e])
                f = p if p > edits.threshold[e] else 0.0
                if edits.encoder[e] >= 0:
                    encoder = encoders[int(edits.encoder[e])]
                    pre_acts = stream[token] @ encoder.W_enc.double() + encoder.b_enc.double()
                    if not is_topk_member(pre_acts, int(edits.feature[e]), encoder.k):
                        f = 0.0
            g = min(max(float(edits.scale[e]) * f + float(edits.shift[e]), float(edits.low[e])), float(edits.high[e]))
            edited[token] += (g - f) * rows[int(edits.write[e])].double()
            if edits.preserve_norm[e]:
                keep_norm.add(token)
    for token in keep_norm:
        norm = edited[token].norm()
        if norm > 0:
            edited[token] *= stream[token].norm() / norm
    new_hidden = edited if residual is None else edited - residual.double()
    limit = stream_limit(hidden.dtype)
    return torch.where(edited == stream, hidden.double(), new_hidden.clamp(-limit, limit))
