"""JSON-lines files that people hand in."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_lines(path: Path, error: type[ValueError]) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of each line that is not blank, gzipped where the file's name ends in .gz.

    error: what is raised, with file and line, where the file cannot be read or a line is not JSON.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as invalid:
                    raise error(f"{where}: not JSON: {invalid}") from None
                yield where, value
    except (OSError, EOFError, UnicodeDecodeError) as unreadable:
        raise error(f"{path}: cannot be read: {unreadable}") from None
