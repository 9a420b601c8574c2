"""What stands whole in the output is finished, wherever the write was cut off."""

import gzip
import subprocess
import sys

import pytest

from steer_server.batch.row_file import RowFile, RowFileError, write_whole

GROUPS = [b"a\n", b"bb\nccc\n", b"d" * 5000 + b"\n", b"e\n"]


@pytest.fixture(params=[False, True], ids=["plain", "gzip"])
def compressed(request):
    return request.param


def filled(path, compressed):
    with RowFile(path, compressed) as file:
        for group in GROUPS:
            file.append(group)
    return path.read_bytes()


def content(path, compressed):
    return gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()


def test_cut_anywhere(tmp_path, compressed):
    """After every possible length of the file: only whole lines, in order, and new ones are appended after them."""
    data = filled(tmp_path / "whole", compressed)
    every = b"".join(GROUPS)
    for length in {*range(60), *range(len(data) - 60, len(data)), *range(0, len(data), 97)}:
        path = tmp_path / "cut"
        path.write_bytes(data[:length])
        with RowFile(path, compressed) as file:
            kept = b"".join(file.lines())
            file.append(b"new\n")
        assert every.startswith(kept)
        assert not kept or kept.endswith(b"\n")
        assert content(path, compressed) == kept + b"new\n"
    assert kept


def test_a_torn_gzip_member_loses_its_group_only(tmp_path):
    data = filled(tmp_path / "a.gz", True)
    (tmp_path / "a.gz").write_bytes(data[:-1])
    with RowFile(tmp_path / "a.gz", True) as file:
        assert b"".join(file.lines()) == b"".join(GROUPS[:-1])


def test_damage_inside_is_not_cut_off(tmp_path):
    data = filled(tmp_path / "a.gz", True)
    (tmp_path / "a.gz").write_bytes(data[:5] + b"\0\0\0\0\0\0\0\0\0\0" + data[15:])
    with RowFile(tmp_path / "a.gz", True) as file, pytest.raises(RowFileError, match="is damaged after byte 0"):
        list(file.lines())


def test_two_runs_cannot_write(tmp_path, compressed):
    path = tmp_path / "a"
    with RowFile(path, compressed), pytest.raises(RowFileError, match="another run"):
        RowFile(path, compressed)
    RowFile(path, compressed).close()


def test_a_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "a"
    opened = f"f = RowFile(Path({str(path)!r}), False)"
    code = f"from steer_server.batch.row_file import *; {opened}; print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(RowFileError, match="another run"):
            RowFile(path, False)
        other.kill()
        other.wait()
    RowFile(path, False).close()


def test_rewriting_keeps_lines_and_lock(tmp_path, compressed):
    path = tmp_path / "a"
    filled(path, compressed)
    with RowFile(path, compressed) as file:
        file.rewrite(lambda line: line[:1] in b"bd")
        with pytest.raises(RowFileError, match="another run"):
            RowFile(path, compressed)
        file.append(b"f\n")
    assert content(path, compressed) == b"bb\n" + b"d" * 5000 + b"\n" + b"f\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_leaves_whole_lines(tmp_path, compressed):
    """RLIMIT_FSIZE is to a process what a full disk is: the write that crosses it is cut short, the next one fails."""
    path = tmp_path / "a"
    code = f"""
import resource, signal
from steer_server.batch.row_file import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
f = RowFile(Path({str(path)!r}), {compressed})
try:
    while True:
        f.append(b"0123456789\\n" * 2)
except RowFileError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cannot be written: File too large" in said
    assert "--resume" in said
    assert path.stat().st_size > 200
    with RowFile(path, compressed) as file:
        before = b"".join(file.lines())
        file.append(b"more\n")
    assert before == b"0123456789\n" * before.count(b"\n")
    assert content(path, compressed) == before + b"more\n"


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(RowFileError, match="cannot be written"):
        RowFile(tmp_path / "no" / "such" / "folder", False)
    with pytest.raises(RowFileError, match="cannot be written: Is a directory"):
        RowFile(tmp_path, False)


def test_a_whole_file_or_none(tmp_path):
    write_whole(tmp_path / "a", b"1")
    write_whole(tmp_path / "a", b"22")
    assert (tmp_path / "a").read_bytes() == b"22"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
