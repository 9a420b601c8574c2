"""Text that a command reads from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


class TextError(ValueError):
    """A file of texts that cannot be read; the message names it."""


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The documents of all files, in order: each line's `text` of a .jsonl file, any other file as a whole.

    Raises TextError, also where there is no text in them at all.
    """
    texts: list[str] = []
    for path in paths:
        try:
            content = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{path}: cannot be read: {error}") from None
        texts += _lines(path, content) if path.suffix == ".jsonl" else [content]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TextError(f"no text in {', '.join(map(str, paths))}")
    return texts


def _lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise TextError(f"{path}:{number}: not an object with a text in `text`")
        texts.append(row["text"])
    return texts
