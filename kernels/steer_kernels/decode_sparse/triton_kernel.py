"""decode_sparse on a GPU: a program gathers a block of columns of a token's decoder rows and adds them up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steer_kernels.pre_activations import row_major
from steer_kernels.triton_target import triton_backend

ROWS = 16
"""Decoder rows in flight at once: at 256 bytes each, with several programs a processor, enough to hide latency."""

COLUMNS = 128


@triton.jit
def _decode(
    features_ptr,
    values_ptr,
    decoder_ptr,
    b_dec_ptr,
    scale_ptr,
    base_ptr,
    out_ptr,
    n,
    d_out,
    features_stride,
    values_stride,
    decoder_stride,
    base_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < d_out
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, n, ROWS):
        at = start + tl.arange(0, ROWS)
        feature = tl.load(features_ptr + token * features_stride + at, mask=at < n, other=-1).to(tl.int64)
        present = feature >= 0
        value = tl.load(values_ptr + token * values_stride + at, mask=present & (at < n), other=0.0).to(tl.float32)
        rows = decoder_ptr + feature[:, None] * decoder_stride + column[None, :]
        row = tl.load(rows, mask=present[:, None] & exists[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * row, axis=0)
    if HAS_BIAS:
        total += tl.load(b_dec_ptr + column, mask=exists, other=0.0).to(tl.float32)
    if HAS_SCALE:
        total *= tl.load(scale_ptr + token)
    if HAS_BASE:
        total += tl.load(base_ptr + token * base_stride + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * d_out + column, total.to(out_ptr.dtype.element_ty), mask=exists)


def decode_sparse_triton(
    features: torch.Tensor,
    values: torch.Tensor,
    decoder: torch.Tensor,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    base: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `decode_sparse_reference`, added up in float32."""
    (n_tokens, n), d_out = features.shape, decoder.shape[1]
    features, values, base = row_major(features), row_major(values), None if base is None else row_major(base)
    out = torch.empty(n_tokens, d_out, dtype=dtype, device=decoder.device)
    if n_tokens == 0:
        return out
    _decode[(n_tokens, triton.cdiv(d_out, COLUMNS))](
        features, values, decoder,
        decoder if b_dec is None else b_dec, values if scale is None else scale, out if base is None else base, out,
        n, d_out, features.stride(0), values.stride(0), decoder.stride(0), 0 if base is None else base.stride(0),
        HAS_BIAS=b_dec is not None, HAS_SCALE=scale is not None, HAS_BASE=base is not None,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4 if triton_backend() == "cuda" else 2,
    )  # fmt: skip
    return out
