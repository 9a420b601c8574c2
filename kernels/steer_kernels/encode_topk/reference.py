"""The oracle: a full sort of float64 pre-activations."""

from __future__ import annotations

import torch

from steer_kernels.pre_activations import check_k, pre_activations_reference, ranked_reference


def encode_topk_reference(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    k: int,
    absolute: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(p [tokens, k] float64, features [tokens, k] int64): the k first-ranked features of each token, in their order.

    Arguments and ranking are those of `steer_kernels.pre_activations`. p has its sign whatever `absolute` is, and no
    ReLU: a TopK SAE's activations (Gao et al. 2024) are p.relu(), an AbsTopK SAE's are p.
    """
    check_k(k, encoder.shape[0])
    pre_acts = pre_activations_reference(x, encoder, b_enc, scale)
    features = ranked_reference(pre_acts, absolute)[:, :k]
    return pre_acts.gather(-1, features), features
