"""Vectors that a checkpoint stores as columns, once more as rows, so that one of them is one short read.

A column of a [4096, 131072] matrix lies on 4,096 pages of its file; a row on two.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

from sae_models.cache import cache_folder, written_whole
from sae_models.tensor_source import SafetensorsFile

NAME = "rows"
BLOCK_BYTES = 1 << 23
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def row_file(source: SafetensorsFile, name: str, sha256: str) -> SafetensorsFile:
    """`name` [width, count] of `source` as tensor `rows` [count, width] of a cached file, written first if missing.

    sha256: of what `source` belongs to; the file is kept under it. Memory stays bounded.
    """
    path = cache_folder() / "rows" / f"{sha256}-{name}.safetensors"
    if not path.is_file():
        with written_whole(path) as temporary:
            _transpose(source, name, temporary)
    return SafetensorsFile(path)


def _transpose(source: SafetensorsFile, name: str, out: Path) -> None:
    width, count = source.shape(name)
    dtype = source.dtype(name)
    assert isinstance(dtype, torch.dtype)
    nbytes = width * count * dtype.itemsize
    rows = {"dtype": _DTYPES[dtype], "shape": [count, width], "data_offsets": [0, nbytes]}
    header = json.dumps({NAME: rows}).encode()
    header += b" " * (-len(header) % 8)
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        step = max(1, BLOCK_BYTES // (width * dtype.itemsize))
        for start in range(0, count, step):
            block = source.read(name, (slice(None), slice(start, start + step)))
            file.write(block.T.contiguous().view(torch.uint8).numpy().data)
