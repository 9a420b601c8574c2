"""encode_topk on a CPU: the matrix product is torch's; the selection looks at few of its numbers twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from steer_kernels.blocks import pre_activation_blocks, pre_activations

GROUP = 64
"""Neighbouring features of which the largest is taken first: one pass, as fast as memory."""

FEW = 1 << 17
"""Pre-activations up to which torch.topk is as fast as the search in groups: measured by benchmarks/kernels."""

FEW_TO_COMPARE = 1 << 9
"""Numbers up to which a loop over them is faster than torch's comparison, measured in the same way."""


def encode_topk_torch(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    k: int,
    absolute: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode_topk_reference`, with p in float32."""
    if 0 < x.shape[0] * encoder.shape[0] <= FEW:
        return _first(pre_activations(x, encoder, b_enc, scale), k, absolute)
    parts = [_first(pre_acts, k, absolute) for _, pre_acts in pre_activation_blocks(x, encoder, b_enc, scale)]
    if not parts:
        return x.new_empty((0, k), dtype=torch.float32), x.new_empty((0, k), dtype=torch.int64)
    return torch.cat([values for values, _ in parts]), torch.cat([features for _, features in parts])


def _first(pre_acts: torch.Tensor, k: int, absolute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ranked = pre_acts.abs() if absolute else pre_acts
    few = _first_few(ranked, k) if ranked.numel() <= FEW else None
    if few is not None and not absolute:
        return few
    features = _first_in_groups(ranked, k) if few is None else few[1]
    return pre_acts.gather(-1, features), features


def _first_few(ranked: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(ranked, features), [n, k], by torch.topk, which leaves the order of equals open: None where any are, or NaN."""
    values, features = ranked.topk(min(k + 1, ranked.shape[1]), dim=-1)
    if not _strictly_decreasing(values):
        return None
    # A compiled model takes what the fake implementation promises for granted, strides included.
    return values.narrow_copy(1, 0, k), features.narrow_copy(1, 0, k)


def _strictly_decreasing(values: torch.Tensor) -> bool:
    """Whether each row falls from number to number, so that none of them are equal and none but a lone one is NaN.

    Few numbers in a loop: after a matrix product the caches hold none of the code of torch's comparisons, and calling
    them takes several times as long as the numbers do.
    """
    if values.numel() > FEW_TO_COMPARE:
        others = values.shape[1] - 1
        return bool((values.narrow(1, 1, others) < values.narrow(1, 0, others)).all())
    for row in values.tolist():
        last = row[0]
        for value in row[1:]:
            if not value < last:
                return False
            last = value
    return True


def _first_in_groups(ranked: torch.Tensor, k: int) -> torch.Tensor:
    """Features [n, k] in rank order, of any ranked [n, d_sae].

    The k-th largest of the groups' maxima is at most the k-th largest number, so what is smaller can be forgotten; a
    stable sort of the little that is left, which stands in the order of features, gives equals to the lower one.
    """
    n, d_sae = ranked.shape
    group = GROUP
    while group > 1 and d_sae < group * 2 * k:
        group //= 2
    if group == 1:
        return _first_by_sort(ranked, k)
    n_groups = -(-d_sae // group)
    if n_groups * group != d_sae:
        ranked = F.pad(ranked, (0, n_groups * group - d_sae), value=-torch.inf)
    groups = ranked.view(n, n_groups, group)
    maxima = groups.amax(-1)
    bound = maxima.topk(k, dim=-1, sorted=False).values.amin(-1)
    # amax hands NaN on, and topk puts it first.
    if bool(maxima.isnan().any()):
        return _first_by_sort(ranked[:, :d_sae], k)
    token, index = (maxima >= bound.unsqueeze(-1)).nonzero(as_tuple=True)
    candidates = groups[token, index]
    row, column = (candidates >= bound[token].unsqueeze(-1)).nonzero(as_tuple=True)
    token, feature = token[row], index[row] * group + column
    value = candidates[row, column]
    counts = torch.bincount(token, minlength=n)
    place = torch.arange(len(token)) - (counts.cumsum(0) - counts)[token]
    width = int(counts.max())
    values = torch.full((n, width), -torch.inf)
    features = torch.full((n, width), d_sae)
    values[token, place], features[token, place] = value, feature
    order = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return features.gather(-1, order)


def _first_by_sort(ranked: torch.Tensor, k: int) -> torch.Tensor:
    by_value = (
        ranked.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        .sort(dim=-1, descending=True, stable=True)
        .indices
    )
    # A second stable sort moves NaN behind minus infinity.
    nan_last = ranked.isnan().gather(-1, by_value).byte().sort(dim=-1, stable=True).indices
    return by_value.gather(-1, nan_last)[:, :k]
