"""Labels of features in text form: JSON lines that people write and review."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sae_models.features.feature import LabelSource

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
        labels.append(checked_label(where, row.get("index"), row.get("label"), source, d_sae))
    return _unique(path, labels)


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line of a JSON-lines file, gzipped where its name ends in .gz."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise LabelError(f"{where}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise LabelError(f"{where}: not an object")
                yield where, row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LabelError(f"{path}: cannot be read: {error}") from None


def checked_label(where: str, index: object, text: object, source: LabelSource, d_sae: int) -> Label:
    """A label, its index in range and its text not empty. Raises LabelError that starts with `where`."""
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < d_sae:
        raise LabelError(f"{where}: index must be a feature of the SAE, 0 to {d_sae - 1}, got {index!r}")
    if not isinstance(text, str) or not text.strip():
        raise LabelError(f"{where}: the label of feature {index} is empty")
    return Label(index, " ".join(text.split())[:MAX_LABEL], source)


def _unique(path: Path, labels: list[Label]) -> list[Label]:
    seen: set[int] = set()
    for label in labels:
        if label.index in seen:
            raise LabelError(f"{path}: feature {label.index} is labelled twice")
        seen.add(label.index)
    return labels
