"""The oracle: rank all float64 pre-activations."""

from __future__ import annotations

import torch

from steer_kernels.pre_activations import pre_activations_reference, ranked_reference


def count_above_reference(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    features: torch.Tensor,
    floor: float,
    absolute: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(p [tokens, n] float64, ahead [tokens, n] int32) of `features` [tokens, n], where -1 asks for nothing.

    ahead is the number of features of the whole SAE that rank before the given one: it is among the k first iff
    ahead < k. Only features with p > floor (|p| > floor where `absolute`) are ranked; ahead is d_sae for the others,
    NaN among them, and for -1, whose p is 0. A TopK SAE has floor 0, since what its ReLU turns off is off at any rank;
    -inf ranks all but minus infinity and NaN.
    """
    pre_acts = pre_activations_reference(x, encoder, b_enc, scale)
    order = ranked_reference(pre_acts, absolute)
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(len(b_enc)).expand_as(order))
    asked = features >= 0
    p = torch.where(asked, pre_acts.gather(-1, features.long().clamp(min=0)), 0.0)
    ranked = asked & ((p.abs() if absolute else p) > floor)
    ahead = torch.where(ranked, ranks.gather(-1, features.long().clamp(min=0)), len(b_enc))
    return p, ahead.int()
