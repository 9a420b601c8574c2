"""Labels of features in text form: JSON lines that people write and review."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sae_models.features.feature import LabelSource
from sae_models.json_lines import json_lines

MAX_LABEL = 200


class LabelError(ValueError):
    """A file of labels that cannot be read; the message names file and line."""


@dataclass(frozen=True)
class Label:
    """A feature, named in plain words."""

    index: int
    label: str
    source: LabelSource


def read_labels(path: Path, d_sae: int) -> list[Label]:
    """Labels of a JSON-lines file, each line `{"index": 740, "label": "scripture"}` with an optional `"source"`."""
    labels = []
    for where, row in json_rows(path):
        source = row.get("source", "read")
        if source not in get_args(LabelSource):
            raise LabelError(f"{where}: source {source!r} is not one of {', '.join(get_args(LabelSource))}")
        index = checked_index(where, row.get("index"), d_sae)
        labels.append(Label(index, checked_label(where, index, row.get("label")), source))
    return _unique(path, labels)


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line of a JSON-lines file, gzipped where its name ends in .gz."""
    for where, row in json_lines(path, LabelError):
        if not isinstance(row, dict):
            raise LabelError(f"{where}: not an object")
        yield where, row


def checked_index(where: str, value: object, d_sae: int, as_text: bool = False) -> int:
    """A feature of the SAE; as_text: digits are one too. Raises LabelError that starts with `where`."""
    index = int(value) if as_text and isinstance(value, str) and value.isdecimal() else value
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < d_sae:
        raise LabelError(f"{where}: index must be a feature of the SAE, 0 to {d_sae - 1}, got {value!r}")
    return index


def checked_label(where: str, index: int, text: object) -> str:
    """The text of a label, on one line. Raises LabelError that starts with `where`."""
    if not isinstance(text, str) or not text.strip():
        raise LabelError(f"{where}: the label of feature {index} is empty")
    return " ".join(text.split())[:MAX_LABEL]


def _unique(path: Path, labels: list[Label]) -> list[Label]:
    seen: set[int] = set()
    for label in labels:
        if label.index in seen:
            raise LabelError(f"{path}: feature {label.index} is labelled twice")
        seen.add(label.index)
    return labels
