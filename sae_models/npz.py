"""Arrays of an .npz archive, copied once into a safetensors file that rows can be read from.

Nothing in an archive is unpickled, and no more is written than its arrays' own headers say.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from sae_models.cache import cache_folder, file_identity, written_whole
from sae_models.errors import SAEFormatError
from sae_models.tensor_source import SafetensorsFile

CHUNK_BYTES = 1 << 22
MAX_RATIO = 16
"""Weights are close to random and hardly compress; an archive that unpacks to more than this is a bomb."""
SLACK_BYTES = 1 << 20
MAX_ARRAYS = 64
_DTYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16"}


def extracted(path: Path) -> tuple[SafetensorsFile, bool]:
    """(the arrays of `path` as tensors of a cached file, whether it had to be written first). Raises SAEFormatError.

    The archive is known again by its inode, size and times, so that opening it a second time does not read it through.
    """
    try:
        key = hashlib.sha256(json.dumps(file_identity(path)).encode()).hexdigest()
        cached = cache_folder() / "npz" / f"{key}.safetensors"
        is_new = not cached.is_file()
        if is_new:
            with zipfile.ZipFile(path) as archive, written_whole(cached) as temporary:
                _copy(archive, path, temporary)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise SAEFormatError(f"{path}: not a readable npz archive: {error}") from None
    return SafetensorsFile(cached), is_new


def _copy(archive: zipfile.ZipFile, path: Path, out: Path) -> None:
    members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    if not members or len(members) > MAX_ARRAYS:
        raise SAEFormatError(f"{path}: {len(members)} arrays; an SAE has between 1 and {MAX_ARRAYS}")
    total = sum(info.file_size for info in members)
    if total > MAX_RATIO * path.stat().st_size + SLACK_BYTES:
        raise SAEFormatError(f"{path}: unpacks from {path.stat().st_size} to {total} bytes; weights do not compress so")
    header: dict[str, object] = {}
    end = 0
    for info in members:
        with archive.open(info) as array:
            shape, dtype = _array_header(array, path, info.filename)
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes > info.file_size:
            raise SAEFormatError(f"{path}: {info.filename} claims {nbytes} bytes and has {info.file_size}")
        name = info.filename.removesuffix(".npy")
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for info in members:
            with archive.open(info) as array:
                shape, dtype = _array_header(array, path, info.filename)
                left = math.prod(shape) * np.dtype(dtype).itemsize
                while left:
                    chunk = array.read(min(CHUNK_BYTES, left))
                    if not chunk:
                        raise SAEFormatError(f"{path}: {info.filename} ends early")
                    file.write(chunk)
                    left -= len(chunk)


def _array_header(array: IO[bytes], path: Path, name: str) -> tuple[tuple[int, ...], str]:
    """(shape, dtype) of an .npy stream, which is left at its first value."""
    try:
        version = np.lib.format.read_magic(array)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(array)
    except ValueError as error:
        raise SAEFormatError(f"{path}: {name} is not a numpy array: {error}") from None
    if dtype.str not in _DTYPES:
        raise SAEFormatError(f"{path}: {name} has dtype {dtype}; supported: {', '.join(_DTYPES)}")
    if fortran and len(shape) > 1:
        raise SAEFormatError(f"{path}: {name} is stored column by column, which is not supported")
    return shape, dtype.str
