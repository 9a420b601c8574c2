"""Vectors that a request brings along."""

from __future__ import annotations

import base64
import binascii

import numpy as np
import numpy.typing as npt

from steer_server.spec import InlineTensor, SteeringError

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def decode_rows(tensor: InlineTensor, d_model: int, n_layers: int, path: str) -> npt.NDArray[np.float32]:
    """The tensor as float32 [rows, d_model]: one row for all of the entry's layers, or one for each.

    Its size is checked before anything is decoded. Raises SteeringError naming the field under `path`.
    """
    shape = tensor.shape if len(tensor.shape) == 2 else [1, *tensor.shape]
    if shape[1] != d_model:
        raise SteeringError(
            f"{path}.shape {tensor.shape} is {shape[1]} wide, the model's residual stream is {d_model}", f"{path}.shape"
        )
    if shape[0] not in (1, n_layers):
        raise SteeringError(
            f"{path}.shape {tensor.shape} has {shape[0]} rows; give 1, or one for each of the {n_layers} layers",
            f"{path}.shape",
        )
    size = shape[0] * shape[1] * ITEM_BYTES[tensor.dtype]
    encoded_size = 4 * ((size + 2) // 3)
    if len(tensor.data) != encoded_size:
        raise SteeringError(
            f"{path}.data has {len(tensor.data)} characters; {tensor.dtype} {tensor.shape} is {size} bytes, "
            f"{encoded_size} characters in base64",
            f"{path}.data",
        )
    try:
        data = base64.b64decode(tensor.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SteeringError(f"{path}.data is not base64: {error}", f"{path}.data") from None
    if len(data) != size:
        raise SteeringError(f"{path}.data decodes to {len(data)} bytes, expected {size}", f"{path}.data")
    rows = _as_float32(data, tensor.dtype).reshape(shape)
    if not np.isfinite(rows).all():
        raise SteeringError(f"{path}.data holds values that are not finite", f"{path}.data")
    return rows


def _as_float32(data: bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype="<f4" if dtype == "float32" else "<f2").astype(np.float32)
