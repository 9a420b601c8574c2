"""A baseline of decode_sparse on a GPU: the first Triton kernel that one would write, row by row for a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _plain_decode(features_ptr, values_ptr, decoder_ptr, b_dec_ptr, out_ptr, n, d_out, SIZE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    exists = column < d_out
    total = tl.load(b_dec_ptr + column, mask=exists, other=0.0).to(tl.float32)
    for i in range(n):
        feature = tl.load(features_ptr + token * n + i).to(tl.int64)
        value = tl.load(values_ptr + token * n + i)
        total += value * tl.load(decoder_ptr + feature * d_out + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * d_out + column, total.to(out_ptr.dtype.element_ty), mask=exists)


def plain_decode(
    features: torch.Tensor, values: torch.Tensor, decoder: torch.Tensor, b_dec: torch.Tensor
) -> torch.Tensor:
    """[tokens, d_out] in decoder's dtype: the sum of values [tokens, n] times decoder rows, and b_dec [d_out]. All are
    row-major and every feature exists."""
    (n_tokens, n), d_out = features.shape, decoder.shape[1]
    out = torch.empty(n_tokens, d_out, dtype=decoder.dtype, device=decoder.device)
    _plain_decode[(n_tokens,)](features, values, decoder, b_dec, out, n, d_out, SIZE=triton.next_power_of_2(d_out))
    return out
