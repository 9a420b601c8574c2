"""An input file that must stay what it was when the job began."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

BLOCK = 1 << 20
_DIGEST = 16


class InputChangedError(RuntimeError):
    """The input is not what it was. Nothing of what changed has been read."""


@dataclass(frozen=True)
class Fingerprint:
    """sha256: of the whole file, hexadecimal. blocks: 16 bytes for each MiB, to check it again while it is read."""

    sha256: str
    size: int
    blocks: bytes


def fingerprint(path: Path, seen: Callable[[bytes], None] | None = None) -> Fingerprint:
    """seen: called with each block. Raises OSError."""
    total, blocks, size = sha256(), bytearray(), 0
    with path.open("rb", buffering=0) as file:
        while block := _read_full(file, BLOCK):
            total.update(block)
            blocks += blake2b(block, digest_size=_DIGEST).digest()
            size += len(block)
            if seen is not None:
                seen(block)
    return Fingerprint(total.hexdigest(), size, bytes(blocks))


def _read_full(file: Any, count: int) -> bytes:
    """`count` bytes, fewer only at the end of the file."""
    pieces: list[bytes] = []
    while count and (piece := file.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


class VerifiedFile(io.RawIOBase):
    """Reads `path`, each block compared with its fingerprint before any byte of it is given out.

    Reading and closing raise InputChangedError.
    """

    def __init__(self, path: Path, expected: Fingerprint) -> None:
        self._path = path
        self._expected = expected
        self._file = path.open("rb", buffering=0)
        self._position = 0
        self._block_index = -1
        self._block = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._expected.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._expected.size:
            self._check_size()
            return 0
        index, offset = divmod(self._position, BLOCK)
        if index != self._block_index:
            self._load(index)
        piece = self._block[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _load(self, index: int) -> None:
        self._file.seek(index * BLOCK)
        block = _read_full(self._file, min(BLOCK, self._expected.size - index * BLOCK))
        digest = self._expected.blocks[index * _DIGEST : (index + 1) * _DIGEST]
        if blake2b(block, digest_size=_DIGEST).digest() != digest:
            raise InputChangedError(
                f"{self._path} changed while the job was reading it, at or after byte {index * BLOCK}"
            )
        self._block_index, self._block = index, block

    def _check_size(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size != self._expected.size:
            raise InputChangedError(
                f"{self._path} changed while the job was reading it: it has {size} bytes and had {self._expected.size}"
            )
