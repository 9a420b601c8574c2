"""Where rows come from: JSON lines, gzip, Parquet, standard input. All are read as they are needed."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from steer_server.batch.rows import MAX_LINE_BYTES
from steer_server.batch.verified_file import Fingerprint, VerifiedFile, fingerprint

Format = Literal["jsonl", "gzip", "parquet"]

GROUP_LINES = 256
GROUP_BYTES = 1 << 20
PARQUET_COLUMNS = ("custom_id", "method", "url", "body")
_BOM = b"\xef\xbb\xbf"


class SourceError(ValueError):
    """An input that cannot be read."""


def format_of(path: Path) -> Format:
    """By the name's ending."""
    if path.suffix == ".gz":
        return "gzip"
    return "parquet" if path.suffix in (".parquet", ".pq") else "jsonl"


class FileSource:
    """A file on disk. fingerprint: of what will be read. total: rows in it, blank lines counted."""

    def __init__(self, path: Path) -> None:
        """Reads it once. Raises SourceError."""
        self.path = path
        self.format = format_of(path)
        try:
            if not path.is_file():
                raise SourceError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
            counter = {"jsonl": _LineCounter, "gzip": _GzipLineCounter, "parquet": _Nothing}[self.format]()
            self.fingerprint: Fingerprint = fingerprint(path, counter.add)
            self.total = _parquet_rows(path) if self.format == "parquet" else counter.total
        except (OSError, zlib.error) as unreadable:
            raise SourceError(f"{path} cannot be read: {unreadable}") from None

    def lines(self) -> Iterator[list[bytes]]:
        """Its rows as JSON lines, in small groups. Raises SourceError, InputChangedError."""
        with VerifiedFile(self.path, self.fingerprint) as raw:
            try:
                if self.format == "parquet":
                    yield from _parquet_lines(raw)
                else:
                    plain: Any = io.BufferedReader(raw, GROUP_BYTES)
                    yield from _grouped(gzip.GzipFile(fileobj=plain) if self.format == "gzip" else plain)
            except (OSError, EOFError, zlib.error) as unreadable:
                raise SourceError(f"{self.path} cannot be read: {unreadable}") from None


class StandardInput:
    """What another program writes; read once, taken as it comes."""

    total = None

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor

    def lines(self) -> Iterator[list[bytes]]:
        kept: list[bytes] = []
        kept_bytes = 0
        mark = _BOM
        while piece := os.read(self._descriptor, GROUP_BYTES):
            head, newline, tail = piece.rpartition(b"\n")
            if newline:
                whole = b"".join([*kept, head]).removeprefix(mark)
                kept, kept_bytes, mark = [], 0, b""
                if lines := [line for line in whole.split(b"\n") if line.strip()]:
                    yield lines
            # Of a line without an end only so much is kept as shows that it is too long.
            if kept_bytes <= MAX_LINE_BYTES:
                kept.append(tail)
                kept_bytes += len(tail)
        last = b"".join(kept).removeprefix(mark)
        if last.strip():
            yield [last]


def _grouped(file: Any) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    first = True
    while line := file.readline(MAX_LINE_BYTES + 1):
        if first:
            line, first = line.removeprefix(_BOM), False
        if len(line) > MAX_LINE_BYTES:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)
        elif not line.strip():
            continue
        group.append(line)
        size += len(line)
        if len(group) >= GROUP_LINES or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _parquet_rows(path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except pyarrow.ArrowInvalid as invalid:
        raise SourceError(f"{path} is not Parquet: {invalid}") from None
    missing = [name for name in ("custom_id", "url", "body") if name not in metadata.schema.to_arrow_schema().names]
    if missing:
        raise SourceError(f"{path} has no column {' or '.join(missing)}; wanted: {', '.join(PARQUET_COLUMNS)}")
    return int(metadata.num_rows)


def _parquet_lines(raw: VerifiedFile) -> Iterator[list[bytes]]:
    """`body` is JSON text, or a struct whose nulls are keys that the row does not have."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(raw, "r"), buffer_size=GROUP_BYTES, pre_buffer=False)
        columns = [name for name in PARQUET_COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(GROUP_LINES, columns=columns, use_threads=False):
            yield [_as_line(row) for row in batch.to_pylist()]
    except pyarrow.ArrowException as invalid:
        raise SourceError(f"Parquet: {invalid}") from None


def _as_line(row: dict[str, Any]) -> bytes:
    body = row["body"]
    fields: dict[str, Any] = {name: value for name, value in row.items() if value is not None}
    if isinstance(body, str | bytes):
        text = body.encode() if isinstance(body, str) else body
        try:
            msgspec.json.decode(text)
            fields["body"] = msgspec.Raw(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as invalid:
            fields["body"] = f"not JSON: {invalid}"
    else:
        fields["body"] = _without_nulls(body)
    return msgspec.json.encode(fields)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


class _LineCounter:
    def __init__(self) -> None:
        self._newlines = 0
        self._open = False

    def add(self, block: bytes) -> None:
        if block:
            self._newlines += block.count(b"\n")
            self._open = not block.endswith(b"\n")

    @property
    def total(self) -> int:
        return self._newlines + self._open


class _GzipLineCounter(_LineCounter):
    def __init__(self) -> None:
        super().__init__()
        self._member = zlib.decompressobj(wbits=31)

    def add(self, block: bytes) -> None:
        while block:
            super().add(self._member.decompress(block, 8 * GROUP_BYTES))
            block = self._member.unconsumed_tail
            if self._member.eof:
                block = self._member.unused_data.lstrip(b"\0")
                self._member = zlib.decompressobj(wbits=31)


class _Nothing(_LineCounter):
    def add(self, block: bytes) -> None:
        return
