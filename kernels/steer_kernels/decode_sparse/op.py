"""The custom op, which runs where its tensors are."""

from __future__ import annotations

import torch

from steer_kernels.decode_sparse.torch_path import decode_sparse_torch


def _check(
    features: torch.Tensor,
    values: torch.Tensor,
    decoder: torch.Tensor,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    base: torch.Tensor | None,
) -> None:
    if features.ndim != 2 or values.shape != features.shape or features.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "features and values must be [tokens, n], features int32 or int64, "
            f"not {list(features.shape)} {features.dtype} and {list(values.shape)}"
        )
    if decoder.stride(1) != 1:
        raise ValueError(f"decoder must have its rows [d_out] together in memory, not strides {decoder.stride()}")
    tokens, d_out = len(features), decoder.shape[1]
    expected = (("b_dec", b_dec, (d_out,)), ("scale", scale, (tokens,)), ("base", base, (tokens, d_out)))
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")


def _decode_sparse_cpu(
    features: torch.Tensor,
    values: torch.Tensor,
    decoder: torch.Tensor,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    base: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    _check(features, values, decoder, b_dec, scale, base)
    return decode_sparse_torch(features, values, decoder, b_dec, scale, base, dtype)


def _decode_sparse_gpu(
    features: torch.Tensor,
    values: torch.Tensor,
    decoder: torch.Tensor,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    base: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    # Machines without a GPU need no Triton.
    from steer_kernels.decode_sparse.triton_kernel import decode_sparse_triton

    _check(features, values, decoder, b_dec, scale, base)
    return decode_sparse_triton(features, values, decoder, b_dec, scale, base, dtype)


def _decode_sparse_fake(
    features: torch.Tensor,
    values: torch.Tensor,
    decoder: torch.Tensor,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    base: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return decoder.new_empty((features.shape[0], decoder.shape[1]), dtype=dtype)


_library = torch.library.Library("steer_kernels", "FRAGMENT")
_library.define(
    "decode_sparse(Tensor features, Tensor values, Tensor decoder, Tensor? b_dec, Tensor? scale, Tensor? base,"
    " ScalarType dtype) -> Tensor"
)
_library.impl("decode_sparse", _decode_sparse_cpu, "CPU")
_library.impl("decode_sparse", _decode_sparse_gpu, "CUDA")
torch.library.register_fake("steer_kernels::decode_sparse", _decode_sparse_fake, lib=_library)

decode_sparse = torch.ops.steer_kernels.decode_sparse
"""decode_sparse(features, values, decoder, b_dec, scale, base, dtype): as `decode_sparse_reference`, summed in float32.

Features must be below d_sae: they are not checked, which would wait for the device.
"""
