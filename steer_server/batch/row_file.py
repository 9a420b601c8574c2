"""The file that result lines are appended to: what stands in it whole is finished, whatever happened afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

_READ = 1 << 20


class RowFileError(RuntimeError):
    """An output that cannot be written, or that is not what this job wrote."""


class RowFile:
    """Result lines, plain or as concatenated gzip members, one for each group; locked against other runs.

    A kill in the midst of a write leaves a torn last line or member. `lines` ends before it and cuts it off, so it must
    be exhausted before anything is appended to a file that was not empty.
    """

    def __init__(self, path: Path, compressed: bool) -> None:
        """Opens `path` and creates it where it is missing. Raises RowFileError."""
        self.path = path
        self._compressed = compressed
        try:
            # Not O_APPEND: a group that failed in its middle is cut off and its place is written again.
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as refused:
            raise RowFileError(f"{path} cannot be written: {refused.strerror}") from None
        self._end = 0
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been replaced between being opened and locked.
            if not os.path.samestat(os.fstat(self._file), path.stat()):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(self._file)
            raise RowFileError(f"{path} is being written by another run") from None
        sync_folder(path.parent)

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def empty(self) -> bool:
        return os.fstat(self._file).st_size == 0

    def lines(self) -> Iterator[bytes]:
        """Every whole line, in the order written; then cuts off what is torn. Raises RowFileError."""
        self._end = 0
        yield from self._gzip_lines() if self._compressed else self._plain_lines()
        os.ftruncate(self._file, self._end)

    def append(self, lines: bytes) -> None:
        """Write whole lines and wait until they are on the disk. Raises RowFileError; the file then ends as before."""
        data = gzip.compress(lines, compresslevel=6, mtime=0) if self._compressed else lines
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, memoryview(data)[written:], self._end + written)
            os.fsync(self._file)
        except OSError as failed:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise RowFileError(
                f"{self.path} cannot be written: {failed.strerror}; what is finished is kept, go on with --resume"
            ) from None
        self._end += len(data)

    def rewrite(self, kept: Callable[[bytes], bool]) -> None:
        """Replace the file, at once or not at all, by one with those of its lines that are `kept`."""
        aside = self.path.with_name(f".{self.path.name}.kept")
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        replacement = RowFile(aside, self._compressed)
        group: list[bytes] = []
        size = 0
        for line in self.lines():
            if not kept(line):
                continue
            group.append(line)
            size += len(line)
            if size >= _READ:
                replacement.append(b"".join(group))
                group, size = [], 0
        if group:
            replacement.append(b"".join(group))
        aside.rename(self.path)
        sync_folder(self.path.parent)
        self.close()
        self._file, self._end = replacement._file, replacement._end
        replacement._file = -1

    def _plain_lines(self) -> Iterator[bytes]:
        torn = b""
        for block in self._blocks():
            *whole, torn = (torn + block).split(b"\n")
            for line in whole:
                self._end += len(line) + 1
                yield line + b"\n"

    def _gzip_lines(self) -> Iterator[bytes]:
        member, pieces, read = zlib.decompressobj(wbits=31), list[bytes](), 0
        for block in self._blocks():
            rest = block
            while rest:
                try:
                    pieces.append(member.decompress(rest))
                except zlib.error as invalid:
                    raise RowFileError(f"{self.path} is damaged after byte {self._end}: {invalid}") from None
                read += len(rest) - len(member.unused_data)
                rest = member.unused_data
                if member.eof:
                    self._end = read
                    yield from (line + b"\n" for line in b"".join(pieces).split(b"\n")[:-1])
                    member, pieces = zlib.decompressobj(wbits=31), []

    def _blocks(self) -> Iterator[bytes]:
        position = 0
        while block := os.pread(self._file, _READ, position):
            position += len(block)
            yield block


class LineStream:
    """Result lines into a pipe or a terminal: nothing is kept, so nothing can be resumed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def append(self, lines: bytes) -> None:
        """Raises RowFileError."""
        try:
            view = memoryview(lines)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as failed:
            raise RowFileError(f"standard output cannot be written: {failed.strerror}") from None

    def close(self) -> None:
        os.close(self._descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` into `path` at once or not at all. Raises OSError."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in it last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
