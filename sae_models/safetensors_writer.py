"""A safetensors file that is written part by part, so that no tensor of it has to be in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def writable_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a new file, all zero, which keeps what is written into them.

    dtype: float64, float32, float16 or bfloat16. Raises OSError where the file cannot be written.
    """
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(start + end)
    data = torch.from_file(str(path), shared=True, size=start + end, dtype=torch.uint8)[start:]
    tensors = {}
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        tensors[name], data = data[:nbytes].view(dtype).reshape(shape), data[nbytes:]
    return tensors
