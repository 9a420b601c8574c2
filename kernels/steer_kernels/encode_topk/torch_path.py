"""encode_topk on a CPU: the matrix product is torch's, the selection is compiled by Numba."""

from __future__ import annotations

import torch

from steer_kernels.blocks import pre_activation_blocks


def encode_topk_torch(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    k: int,
    absolute: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode_topk_reference`, with p in float32."""
    # It is compiled when it is imported: not on machines that have no use for it.
    from steer_kernels.cpu_ranks import first_k

    values, features = (torch.empty(x.shape[0], k, dtype=dtype) for dtype in (torch.float32, torch.int64))
    for tokens, pre_acts in pre_activation_blocks(x, encoder, b_enc, scale):
        first_k(pre_acts, k, absolute, values[tokens], features[tokens])
    return values, features
