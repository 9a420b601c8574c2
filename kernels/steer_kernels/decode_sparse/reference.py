"""The oracle: the sum, feature by feature, in float64."""

from __future__ import annotations

import torch


def decode_sparse_reference(
    features: torch.Tensor,
    values: torch.Tensor,
    decoder: torch.Tensor,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    base: torch.Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """base + scale * (sum_j values[t, j] * decoder[features[t, j]] + b_dec), [tokens, d_out], rounded once, to `dtype`.

    features: [tokens, n] integers below d_sae; a negative one is padding and adds nothing, whatever its value.
    values: [tokens, n]; decoder: [d_sae, d_out]; b_dec: [d_out] or None for 0; scale: [tokens], a token norm's s(x), or
    None for 1; base: [tokens, d_out] or None for 0. A NaN or infinite value makes its own token's sum NaN or infinite.
    """
    out = torch.zeros(len(features), decoder.shape[1], dtype=torch.float64)
    for token in range(len(features)):
        for feature, value in zip(features[token].tolist(), values[token].double(), strict=True):
            if feature >= 0:
                out[token] += value * decoder[feature].double()
    if b_dec is not None:
        out += b_dec.double()
    if scale is not None:
        out *= scale.double().unsqueeze(-1)
    if base is not None:
        out += base.double()
    return out.to(dtype)
