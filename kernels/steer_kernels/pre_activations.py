"""What every whole-SAE kernel computes first, and the order in which features are ranked by it.

    p[t, j] = scale[t] * (x[t] . encoder[j]) + b_enc[j]

x: [tokens, d_in]; encoder: [d_sae, d_in], one row a feature, with any strides, in x's dtype; b_enc: [d_sae] float32;
scale: [tokens] float32 or None for 1, the part of a token norm that cannot be folded into rows. Kernels multiply in the
dtype that they are given and add up in float32; p is never rounded to less than float32.

Ranking is a total order, so that results do not depend on the machine: larger p first (larger |p| where `absolute`), of
equals the lower index, NaN after everything else, minus infinity included. 0.0 and -0.0 are equal. A NaN or infinity in
x makes p of its own token NaN or infinite as IEEE arithmetic has it, and never touches another token.
"""

from __future__ import annotations

import torch

HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF_DTYPES)


def check_encoder(
    x: torch.Tensor, encoder: torch.Tensor, b_enc: torch.Tensor, scale: torch.Tensor | None, *, any_dtype: bool = False
) -> None:
    """Raise ValueError where the arguments do not fit each other. any_dtype: float64 is allowed too."""
    if x.ndim != 2 or encoder.ndim != 2 or x.shape[1] != encoder.shape[1]:
        raise ValueError(
            f"x and encoder must be [tokens, d_in] and [d_sae, d_in], not {list(x.shape)} and {list(encoder.shape)}"
        )
    if not any_dtype and (x.dtype not in DTYPES or encoder.dtype != x.dtype):
        raise ValueError(f"x and encoder must both be float32, float16 or bfloat16, not {x.dtype} and {encoder.dtype}")
    for name, vector, length in (("b_enc", b_enc, encoder.shape[0]), ("scale", scale, x.shape[0])):
        if vector is not None and (vector.shape != (length,) or not (any_dtype or vector.dtype == torch.float32)):
            raise ValueError(f"{name} must be [{length}] float32, not {list(vector.shape)} {vector.dtype}")


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its rows together in memory, as the kernels walk them; copied only where they are not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check_k(k: int, d_sae: int) -> None:
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must be between 1 and d_sae = {d_sae}, not {k}")


def pre_activations_reference(
    x: torch.Tensor, encoder: torch.Tensor, b_enc: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """p [tokens, d_sae], float64."""
    check_encoder(x, encoder, b_enc, scale, any_dtype=True)
    products = x.double() @ encoder.double().T
    return (products if scale is None else products * scale.double().unsqueeze(-1)) + b_enc.double()


def ranked_reference(pre_acts: torch.Tensor, absolute: bool) -> torch.Tensor:
    """Features [tokens, d_sae] of pre_acts [tokens, d_sae], the first-ranked first."""
    size = pre_acts.abs() if absolute else pre_acts
    by_size = size.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).sort(
        dim=-1, descending=True, stable=True
    )
    nan_last = size.isnan().gather(-1, by_size.indices).to(torch.uint8).sort(dim=-1, stable=True)
    return by_size.indices.gather(-1, nan_last.indices)
