"""Named tensors that stay on disk until some of them are asked for."""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from sae_models.errors import SAEFormatError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
BLOCK_BYTES = 1 << 23

Index = tuple[slice, ...]
"""For the first axes of a tensor, the positions that are wanted; without steps."""

Value = str | int | float | None


class TensorSource(Protocol):
    """path: the file that holds the tensors, for messages and checksums."""

    @property
    def path(self) -> Path: ...

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype | str:
        """The dtype; what the file calls it where it is not a float that we read."""
        ...

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """The tensor, or the part of it that `index` selects, in its own dtype."""
        ...


@dataclass(frozen=True)
class _Placed:
    """dtype: as the file calls it. start: the tensor's first byte in the file."""

    shape: tuple[int, ...]
    dtype: str
    start: int


class SafetensorsFile:
    """Tensors of one safetensors file. Raises SAEFormatError where it is none.

    What is asked for is read, not mapped: pages of a mapping count as memory of the process, also those around a row
    that the kernel maps in addition.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Kept open: a file that is replaced later is still the one whose header was read.
            self._file = path.open("rb", buffering=0)
            self._header = self._read_header()
        except (SafetensorError, OSError) as error:
            raise SAEFormatError(f"{path}: not a readable safetensors file: {error}") from None

    def _read_header(self) -> dict[str, _Placed]:
        header = {}
        with safe_open(self.path, framework="pt") as checked:
            (length,) = struct.unpack("<Q", self._file.read(8))
            described = json.loads(self._file.read(length))
            for name in checked.keys():  # noqa: SIM118
                view = checked.get_slice(name)
                start = 8 + length + described[name]["data_offsets"][0]
                header[name] = _Placed(tuple(view.get_shape()), view.get_dtype(), start)
        return header

    def names(self) -> frozenset[str]:
        return frozenset(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header[name].shape

    def dtype(self, name: str) -> torch.dtype | str:
        called = self._header[name].dtype
        return _DTYPES.get(called, called)

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        placed = self._header[name]
        dtype = _DTYPES.get(placed.dtype) or _INTEGERS.get(placed.dtype)
        if dtype is None:
            raise SAEFormatError(f"{self.path}: {name} has dtype {placed.dtype}, which is not supported")
        ranges = [range(size) for size in placed.shape]
        ranges[: len(index)] = [part[wanted] for part, wanted in zip(ranges, index, strict=False)]
        out = torch.empty([len(part) for part in ranges], dtype=dtype)
        buffer = memoryview(out.reshape(-1).view(torch.uint8).numpy()) if out.numel() else memoryview(b"")
        done = 0
        try:
            for start, nbytes in _runs(placed.shape, ranges, dtype.itemsize):
                self._fill(buffer[done : done + nbytes], placed.start + start)
                done += nbytes
        except OSError as error:
            raise SAEFormatError(f"{self.path}: {name} cannot be read: {error}") from None
        return out

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            read = os.preadv(self._file.fileno(), [buffer], offset)
            if not read:
                raise SAEFormatError(f"{self.path} ends early: it was changed while it was open")
            buffer, offset = buffer[read:], offset + read


def _runs(shape: tuple[int, ...], ranges: Sequence[range], itemsize: int) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each contiguous piece of a row-major array of `shape` that lies in `ranges`."""
    if not shape:
        yield 0, itemsize
        return
    strides = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # Axes behind the last one that is not wanted whole belong to the piece.
    last = max((axis for axis, part in enumerate(ranges) if len(part) < shape[axis]), default=0)
    nbytes = len(ranges[last]) * strides[last]
    if nbytes:
        for outer in itertools.product(*ranges[:last]):
            yield sum(i * stride for i, stride in zip((*outer, ranges[last].start), strides, strict=False)), nbytes


class LoadedTensors:
    """Tensors in memory, such as those of a pickle that a process of its own has read.

    state: nested dictionaries of tensors, numbers and strings, as a module's `state_dict` is; a name within another is
    `outer.inner`. values: what in it is no tensor. Raises SAEFormatError where it holds anything else.
    """

    def __init__(self, path: Path, state: object) -> None:
        self.path = path
        self._tensors: dict[str, torch.Tensor] = {}
        self.values: dict[str, Value] = {}
        if not isinstance(state, Mapping):
            raise SAEFormatError(f"{path}: holds a {type(state).__name__}, not a dictionary of tensors")
        self._take(state, "")

    def _take(self, state: Mapping[object, object], prefix: str) -> None:
        for key, value in state.items():
            name = f"{prefix}{key}"
            if isinstance(value, torch.Tensor):
                self._tensors[name] = value.detach()
            elif isinstance(value, Mapping):
                self._take(value, f"{name}.")
            elif value is None or isinstance(value, str | int | float):
                self.values[name] = value
            else:
                raise SAEFormatError(f"{self.path}: {name} is a {type(value).__name__}, not a tensor")

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | str:
        return self._tensors[name].dtype

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        return self._tensors[name][index] if index else self._tensors[name]


def blocks(source: TensorSource, name: str, block_bytes: int = BLOCK_BYTES) -> Iterator[torch.Tensor]:
    """The tensor in parts along its first axis, in bounded memory."""
    shape = source.shape(name)
    if not shape:
        yield source.read(name)
        return
    step = max(1, block_bytes // (8 * max(1, math.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield source.read(name, (slice(start, start + step),))


def vector_length(source: TensorSource, name: str) -> int:
    """The length of a vector, where no configuration says it. Raises SAEFormatError where it is missing or is none."""
    if name not in source.names():
        raise SAEFormatError(f"{source.path}: tensor {name} is missing; found: {_found(source)}")
    shape = source.shape(name)
    if len(shape) != 1 or shape[0] < 1:
        raise SAEFormatError(f"{source.path}: {name} has shape {list(shape)}, expected a vector")
    return shape[0]


def _found(source: TensorSource) -> str:
    return ", ".join(sorted(source.names())) or "none"


def check_tensor(source: TensorSource, name: str, shape: tuple[int, ...]) -> None:
    """Raise SAEFormatError where a tensor is missing, has another shape or is not of a float type."""
    if name not in source.names():
        raise SAEFormatError(f"{source.path}: tensor {name} is missing; found: {_found(source)}")
    if source.shape(name) != shape:
        raise SAEFormatError(
            f"{source.path}: {name} has shape {list(source.shape(name))}, expected {list(shape)}"
            + (" (it is transposed)" if source.shape(name) == shape[::-1] and len(shape) == 2 else "")
        )
    if source.dtype(name) not in FLOATS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise SAEFormatError(f"{source.path}: {name} has dtype {source.dtype(name)}; supported: {known}")


def check_finite(source: TensorSource, name: str) -> None:
    """Raise SAEFormatError where a tensor holds NaN or an infinity."""
    for block in blocks(source, name):
        # A block's extremes are NaN where one of its values is, and many times faster than a look at each.
        if block.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(block)):
            raise SAEFormatError(f"{source.path}: {name} holds values that are not finite")
