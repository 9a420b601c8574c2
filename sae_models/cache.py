"""Where derived files are kept, and how they get there whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """`$STEER_SERVER_CACHE`, or `steer-server` in the user's cache folder."""
    given = os.environ.get("STEER_SERVER_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "steer-server"


def file_identity(path: Path) -> tuple[str, int, int, int, int]:
    """What stays the same only as long as a file does: path, inode, bytes, times of its last changes in ns."""
    resolved, stat = path.resolve(), path.stat()
    return str(resolved), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new file's path to write to, which becomes `path` at the end, or nothing at all where the writer fails.

    Several processes may do so at once: each writes a file of its own, and the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
