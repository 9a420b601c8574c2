"""A copy of an encoder at eight bits a weight, and how far its pre-activations can be from the encoder's own.

Reading the copy costs half of reading half precision, which is what encoding a few tokens is bound by. A kernel screens
with it: what cannot matter by the bound below is dropped, what is left is added up from the encoder's own rows, and so
nothing of the quantisation shows in a result.

    w8[j] = step[j] * weights[j]        p8[t, j] = scale[t] * (x[t] . w8[j]) + b_enc[j]

    |p8 - p| <= |scale[t]| * size[t] * slack[j] + 2**-20 * |b_enc[j]| + 2**-120

Both p8 and p as float32 adds them up, in any order. By Cauchy and Schwarz |x . (w8 - w)| <= |x| |w8 - w|. A sum of n
products errs by at most n * 2**-24 of the sum of their magnitudes (Higham, Accuracy and Stability, 4.2), which is at
most |x| |w|; twice that, because tensor cores truncate where IEEE rounds; and eight operations more for the
multiplications by step and scale, the bias, and the arithmetic of the bound itself:

    slack[j] = |w8 - w| + 2 * (n + 8) * 2**-24 * (|w| + |w8|)       size[t] = |x|

Neither |x| counts as less than 2**-60 nor |w| as less than 2**-40, so that slack covers what underflows. size is
infinite, and with it the bound, where a sum could come near float32's end, and slack where a row is not finite.

int8 is the tighter one: its steps are even, and of rows with the bell shape that SAEs have it loses a third of what
e4m3 does, whose steps are finest where no weight matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

EIGHT_BIT_DTYPES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of each."""

BIAS_SLACK = 2.0**-20
UNDERFLOW = 2.0**-120
LARGEST = 2.0**120

_ROUNDED_UP = 1 + 2.0**-16
_QUANTISED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class EightBitEncoder:
    """weights: [d_sae, d_in] int8 or float8_e4m3fn; step, slack: [d_sae] float32; longest: [1] float32, the largest |w|
    of a finite row."""

    weights: torch.Tensor
    step: torch.Tensor
    slack: torch.Tensor
    longest: torch.Tensor


def quantise(encoder: torch.Tensor, dtype: torch.dtype = torch.int8) -> EightBitEncoder:
    """The copy of encoder [d_sae, d_in]: each row by its largest magnitude, rounded to the nearest."""
    if dtype not in EIGHT_BIT_DTYPES:
        raise ValueError(f"eight bits are int8 or float8_e4m3fn, not {dtype}")
    rows_at_once = max(1, _QUANTISED_AT_ONCE // max(1, encoder.shape[1]))
    parts = [_quantise_rows(rows, dtype) for rows in encoder.split(rows_at_once)]
    weights, step, slack, length = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return EightBitEncoder(weights, step, slack, length.amax().reshape(1))


def _quantise_rows(
    encoder: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    finite = encoder.isfinite().all(-1, keepdim=True)
    rows = torch.where(finite, encoder.double(), 0.0)
    # A step that float32 holds with all its digits, also where a row is zero.
    step = (rows.abs().amax(-1, keepdim=True) / EIGHT_BIT_DTYPES[dtype]).clamp(min=2.0**-100).float()
    scaled = (rows / step.double()).clamp(-EIGHT_BIT_DTYPES[dtype], EIGHT_BIT_DTYPES[dtype])
    weights = (scaled.round() if dtype == torch.int8 else scaled.float()).to(dtype)
    rounded = weights.double() * step.double()
    length, rounded_length = (vector.norm(dim=-1).clamp(min=2.0**-40) for vector in (rows, rounded))
    rounding = 2 * (encoder.shape[1] + 8) * 2.0**-24
    slack = (rows - rounded).norm(dim=-1) + rounding * (length + rounded_length)
    slack = torch.where(finite.squeeze(-1), slack * _ROUNDED_UP, torch.inf)
    return weights, step.squeeze(-1), slack.float(), (length * _ROUNDED_UP).float()


def token_sizes(x: torch.Tensor, eight_bit: EightBitEncoder, scale: torch.Tensor | None) -> torch.Tensor:
    """|scale| * size [tokens], float32, of x [tokens, d_in]: what slack is multiplied by."""
    # In float64 squares neither overflow nor underflow.
    size = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).clamp(min=2.0**-60) * _ROUNDED_UP
    scaled = size if scale is None else size * scale.double().abs()
    # Products are added up before they are multiplied by step: a row of `weights` is no longer than this.
    level = EIGHT_BIT_DTYPES[eight_bit.weights.dtype] * x.shape[1] ** 0.5
    most = torch.maximum(size * level, torch.maximum(size, scaled) * eight_bit.longest)
    # NaN is not less than anything.
    near_end = ~(most < LARGEST)
    return torch.where(near_end, torch.inf, scaled).float()


def eight_bit_reference(
    x: torch.Tensor, eight_bit: EightBitEncoder, b_enc: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(p8, its bound), both [tokens, d_sae] float64."""
    products = x.double() @ (eight_bit.weights.double() * eight_bit.step.double().unsqueeze(-1)).T
    p8 = (products if scale is None else products * scale.double().unsqueeze(-1)) + b_enc.double()
    slack = token_sizes(x, eight_bit, scale).double().unsqueeze(-1) * eight_bit.slack.double()
    return p8, slack + BIAS_SLACK * b_enc.double().abs() + UNDERFLOW


def check_eight_bit(eight_bit: EightBitEncoder, encoder: torch.Tensor) -> None:
    """Raise ValueError where the copy cannot be one of encoder [d_sae, d_in]."""
    weights, d_sae = eight_bit.weights, encoder.shape[0]
    if weights.shape != encoder.shape or weights.dtype not in EIGHT_BIT_DTYPES or not weights.is_contiguous():
        raise ValueError(
            f"weights must be {list(encoder.shape)} int8 or float8_e4m3fn, row-major, not {list(weights.shape)} "
            f"{weights.dtype}: make them with steer_kernels.eight_bit.quantise"
        )
    for name, length in (("step", d_sae), ("slack", d_sae), ("longest", 1)):
        vector = getattr(eight_bit, name)
        if vector.shape != (length,) or vector.dtype != torch.float32:
            raise ValueError(f"{name} must be [{length}] float32, not {list(vector.shape)} {vector.dtype}")
