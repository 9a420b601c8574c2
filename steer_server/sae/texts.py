"""Text that a command reads from files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sae_models.json_lines import json_lines


class TextError(ValueError):
    """A file of texts that cannot be read; the message names it."""


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The documents of all files, in order: each line's `text` of a .jsonl file, any other file as a whole.

    Raises TextError, also where there is no text in them at all.
    """
    texts: list[str] = []
    for path in paths:
        texts += _lines(path) if path.suffix == ".jsonl" else [_whole(path)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TextError(f"no text in {', '.join(map(str, paths))}")
    return texts


def _lines(path: Path) -> Iterator[str]:
    for where, row in json_lines(path, TextError):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise TextError(f"{where}: not an object with a text in `text`")
        yield row["text"]


def _whole(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path}: cannot be read: {error}") from None
