"""Named tensors that stay on disk until some of them are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from sae_models.errors import SAEFormatError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK_BYTES = 1 << 24

Index = tuple[slice | int, ...]


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


class SafetensorsFile:
    """Tensors of one safetensors file. Raises SAEFormatError where it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = self._read_header()

    @cached_property
    def _file(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise SAEFormatError(f"{self.path}: not a readable safetensors file: {error}") from None

    def _read_header(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | str]]:
        header = {}
        for name in self._file.keys():  # noqa: SIM118
            view = self._file.get_slice(name)
            dtype = view.get_dtype()
            header[name] = (tuple(view.get_shape()), _DTYPES.get(dtype, dtype))
        return header

    def names(self) -> frozenset[str]:
        return frozenset(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header[name][0]

    def dtype(self, name: str) -> torch.dtype | str:
        return self._header[name][1]

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        try:
            if not index:
                return self._file.get_tensor(name)
            return self._file.get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise SAEFormatError(f"{self.path}: {name} cannot be read: {error}") from None

    def reopened(self) -> SafetensorsFile:
        """The same file through a mapping of its own, whose pages leave memory with it."""
        return SafetensorsFile(self.path)


class LoadedTensors:
    """Tensors in memory, such as those of a pickle that a process of its own has read."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path = path
        self._tensors = dict(tensors)

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
        part = source.reopened() if isinstance(source, SafetensorsFile) else source
        yield part.read(name, (slice(start, start + step),))


def check_tensor(source: TensorSource, name: str, shape: tuple[int, ...]) -> None:
    """Raise SAEFormatError where a tensor is missing, has another shape or is not of a float type."""
    if name not in source.names():
        found = ", ".join(sorted(source.names())) or "none"
        raise SAEFormatError(f"{source.path}: tensor {name} is missing; found: {found}")
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
        if not torch.isfinite(block).all():
            raise SAEFormatError(f"{source.path}: {name} holds values that are not finite")
