"""Inputs: the same lines from every kind of file, and no byte of one that changed."""

import gzip
import json
import os
import random
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steer_server.batch.rows import MAX_LINE_BYTES
from steer_server.batch.sources import FileSource, SourceError, StandardInput
from steer_server.batch.verified_file import BLOCK, InputChangedError, VerifiedFile, fingerprint
from tests.batch.stub import line, write_lines


def read(source):
    return [one.rstrip(b"\r\n") for group in source.lines() for one in group]


LINES = [line(f"r{i}", "é" * (i % 7)).encode() for i in range(1000)]


@pytest.fixture(params=["jsonl", "no newline at the end", "crlf, byte order mark, blank lines", "gzip", "gzip members"])
def written(request, tmp_path):
    text = b"\n".join(LINES) + b"\n"
    name, data = {
        "jsonl": ("a.jsonl", text),
        "no newline at the end": ("a.jsonl", text[:-1]),
        "crlf, byte order mark, blank lines": ("a.jsonl", b"\xef\xbb\xbf" + b"\r\n \r\n".join(LINES)),
        "gzip": ("a.jsonl.gz", gzip.compress(text)),
        "gzip members": ("a.jsonl.gz", gzip.compress(text[:5000]) + gzip.compress(text[5000:])),
    }[request.param]
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def test_lines(written):
    source = FileSource(written)
    assert read(source) == LINES
    assert source.total in (1000, 1999)


def test_standard_input():
    """It comes in pieces that end anywhere."""
    text = b"\xef\xbb\xbf" + b"\n\n".join(LINES)
    reading, writing = os.pipe()

    def write():
        rest = text
        while rest:
            count = random.choice((1, 2, 300))
            os.write(writing, rest[:count])
            rest = rest[count:]
        os.close(writing)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert read(StandardInput(reading)) == LINES
    finally:
        os.close(reading)
        writer.join()


@pytest.mark.parametrize("body", ["text", "struct"])
def test_parquet(tmp_path, body):
    bodies = [
        {"prompt": "a", "n": i, "steering": {"vectors": [{"layers": [1]}]} if i % 2 else None} for i in range(600)
    ]
    table = {
        "custom_id": [f"r{i}" for i in range(600)],
        "url": ["/v1/completions"] * 600,
        "ignored": list(range(600)),
        "body": [json.dumps(b) for b in bodies] if body == "text" else bodies,
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=100)
    source = FileSource(tmp_path / "a.parquet")
    assert source.total == 600
    rows = [json.loads(one) for one in read(source)]
    assert [row["custom_id"] for row in rows] == table["custom_id"]
    without_nulls = [{k: v for k, v in b.items() if v is not None} for b in bodies]
    assert [row["body"] for row in rows] == (bodies if body == "text" else without_nulls)


def test_parquet_text_that_is_not_json_is_a_bad_row(tmp_path):
    pq.write_table(pa.table({"custom_id": ["a"], "url": ["/v1/completions"], "body": ["{"]}), tmp_path / "a.parquet")
    (only,) = read(FileSource(tmp_path / "a.parquet"))
    assert json.loads(only)["body"].startswith("not JSON")


def test_what_cannot_be_read_says_so(tmp_path):
    pq.write_table(pa.table({"custom_id": ["a"]}), tmp_path / "columns.parquet")
    for name, data in {"not.parquet": b"x" * 100, "not.jsonl.gz": b"x" * 100}.items():
        (tmp_path / name).write_bytes(data)
    for name, says in {
        "missing.jsonl": "does not exist",
        ".": "not a file",
        "columns.parquet": "no column url or body",
        "not.parquet": "not Parquet",
        "not.jsonl.gz": "cannot be read",
    }.items():
        with pytest.raises(SourceError, match=says):
            FileSource(tmp_path / name)


def test_a_gzip_file_that_ends_too_early(tmp_path):
    whole = gzip.compress(random.Random(0).randbytes(3 << 20).hex().encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="cannot be read"):
        read(FileSource(tmp_path / "a.jsonl.gz"))


def test_a_line_that_never_ends_costs_one_row(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b"first\n")
        for _ in range(3):
            file.write(b"x" * (MAX_LINE_BYTES // 2))
        file.write(b"\nlast\n")
    lengths = [len(one) for one in read(FileSource(path))]
    assert lengths == [5, MAX_LINE_BYTES + 1, 4]


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large.jsonl"
    path.write_bytes(b"".join(line(f"r{i}", "x" * 1000).encode() + b"\n" for i in range(4000)))
    assert path.stat().st_size > 4 * BLOCK
    return path


def test_a_changed_block_is_not_read(large):
    source = FileSource(large)
    groups = source.lines()
    before = next(groups)
    with large.open("r+b") as file:
        file.seek(2 * BLOCK + 100)
        file.write(b"!")
    read_after = []
    with pytest.raises(InputChangedError, match="changed while the job was reading it"):
        read_after.extend(one for group in groups for one in group)
    assert not any(b"!" in one for one in [*before, *read_after])


@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_another_size(large, change):
    source = FileSource(large)
    os.truncate(large, large.stat().st_size + (1 if change == "longer" else -1))
    with pytest.raises(InputChangedError):
        read(source)


def test_verified_reads_anywhere(large):
    data = large.read_bytes()
    rng = random.Random(1)
    with VerifiedFile(large, fingerprint(large)) as file:
        for _ in range(200):
            start, count = rng.randrange(len(data)), rng.randrange(3 * BLOCK)
            file.seek(start)
            piece = file.read(count)
            assert piece == data[start : start + len(piece)]
            assert piece or not count
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]


def test_an_empty_file(tmp_path):
    source = FileSource(write_lines(tmp_path / "a.jsonl", []))
    assert read(source) == []
    assert source.total == 0
