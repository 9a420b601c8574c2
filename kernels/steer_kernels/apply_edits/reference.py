"""The oracle: the definition, one token and one row at a time, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from steer_kernels.apply_edits.edits import (
    LAYER_NORM_EPS,
    SMALLEST_NORM,
    SiteEdits,
    TokenNorm,
    TopKEncoder,
    stream_limit,
)


def is_topk_member(scores: torch.Tensor, feature: int, k: int) -> bool:
    """Whether `feature` is among the k largest of scores [features]; equal values go to the lower index."""
    value = scores[feature]
    ahead = int((scores > value).sum()) + int((scores[:feature] == value).sum())
    return ahead < k


def survival(x: torch.Tensor, feature: int, encoder: TopKEncoder) -> float:
    """What the activation of `feature` is multiplied by: 0 where it does not survive; x [d_model] float64, scaled."""
    pre_acts = x @ encoder.W_enc.double() + encoder.b_enc.double()
    scores = pre_acts.abs() if encoder.absolute else pre_acts
    group, place = divmod(feature, encoder.group_size)
    own_group = scores[group * encoder.group_size : (group + 1) * encoder.group_size]
    if not is_topk_member(own_group, place, encoder.k):
        return 0.0
    if encoder.router is None:
        return 1.0
    W, b = encoder.router
    logits = x @ W.double() + b.double()
    chosen = int((logits == logits.max()).nonzero()[0])
    return float(logits.softmax(0)[chosen]) if chosen == group else 0.0


def token_scales(x: torch.Tensor, norm: TokenNorm) -> tuple[float, float]:
    """(a, s) of one token's stream x [d_model], float64."""
    if norm is TokenNorm.LAYER_NORM:
        std = float((x - x.mean()).norm() / (len(x) - 1) ** 0.5)
        return 1.0 / (std + LAYER_NORM_EPS), std
    if norm is TokenNorm.CONSTANT_NORM:
        length, root = float(x.norm()), len(x) ** 0.5
        return root / max(length, SMALLEST_NORM), length / root
    return 1.0, 1.0


def apply_edits_reference(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    edits: SiteEdits,
    encoders: Sequence[TopKEncoder] = (),
    sources: Mapping[int, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the new `hidden`, float64, such that new hidden + residual is the edited residual stream.

    edits: those of one site, and the conditions of their gates.

    hidden, residual: [tokens, d_model], the stream being their sum (residual None: hidden alone).
    rows: [capacity, d_model], the row bank. sources: by site, the streams that rows read elsewhere.
    """
    stream = hidden.double() if residual is None else hidden.double() + residual.double()
    edited = stream.clone()
    keep_norm: set[int] = set()
    closed: set[tuple[int, int]] = set()
    # Conditions first.
    for e in np.argsort(~edits.is_condition, kind="stable"):
        source = int(edits.source[e])
        read_stream = stream if source < 0 else (sources or {})[source].double()
        for token in range(int(edits.start[e]), int(edits.stop[e])):
            x = read_stream[token]
            a, s = token_scales(x, TokenNorm(int(edits.norm[e])))
            f = 0.0
            if edits.read[e] >= 0:
                p = a * float(x @ rows[int(edits.read[e])].double()) + float(edits.bias[e])
                f = p if p > edits.threshold[e] else 0.0
                if edits.encoder[e] >= 0:
                    f *= survival(a * x, int(edits.feature[e]), encoders[int(edits.encoder[e])])
            if edits.is_condition[e]:
                if (f > edits.low[e]) != (edits.scale[e] >= 0):
                    closed.add((int(edits.gate[e]), token))
                continue
            if (int(edits.gate[e]), token) in closed:
                continue
            g = min(max(float(edits.scale[e]) * f + float(edits.shift[e]), float(edits.low[e])), float(edits.high[e]))
            edited[token] += s * (g - f) * rows[int(edits.write[e])].double()
            if edits.preserve_norm[e]:
                keep_norm.add(token)
    for token in keep_norm:
        norm = edited[token].norm()
        if norm > 0:
            edited[token] *= stream[token].norm() / norm
    new_hidden = edited if residual is None else edited - residual.double()
    limit = stream_limit(hidden.dtype)
    return torch.where(edited == stream, hidden.double(), new_hidden.clamp(-limit, limit))
