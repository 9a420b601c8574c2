"""Explanations and feature rows out of Neuronpedia's exports.

Layout: `v1/MODEL/SOURCE/{explanations,features}/batch-N.jsonl.gz` (docs.neuronpedia.org/api-and-data/exports).
An explanation row has `index` (text) and `description`; a feature row `index`, `maxActApprox`, `frac_nonzero`,
`pos_str`, `pos_values`, `neg_str` and `neg_values`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_models.features.feature import Feature, TokenScore
from sae_models.features.labels import LabelError, checked_index, checked_label, json_rows


def read_neuronpedia(paths: Iterable[Path], d_sae: int) -> dict[int, Feature]:
    """Features by index, of files of either kind, packed or not, in any order.

    Of several explanations of a feature the first is kept. What a file does not say is unknown: None for numbers.
    Raises LabelError naming file and line.
    """
    features: dict[int, Feature] = {}
    for path in paths:
        for where, row in json_rows(path):
            index = checked_index(where, row.get("index"), d_sae, as_text=True)
            feature = features.get(index) or Feature(index, None, None, None)
            if "description" in row:
                if not feature.label:
                    label = checked_label(where, index, row["description"])
                    feature = replace(feature, label=label, label_source="imported")
            elif "maxActApprox" in row or "frac_nonzero" in row:
                feature = replace(
                    feature,
                    max_activation=_number(where, row, "maxActApprox"),
                    density=_number(where, row, "frac_nonzero"),
                    raised=_scores(where, row, "pos"),
                    lowered=_scores(where, row, "neg"),
                )
            else:
                raise LabelError(f"{where}: neither an explanation (`description`) nor a feature (`maxActApprox`)")
            features[index] = feature
    return features


def _number(where: str, row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise LabelError(f"{where}: {key} must be a number, got {value!r}")
    return float(value)


def _scores(where: str, row: dict[str, Any], sign: str) -> tuple[TokenScore, ...]:
    tokens, values = row.get(f"{sign}_str") or [], row.get(f"{sign}_values") or []
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
        raise LabelError(f"{where}: {sign}_str and {sign}_values must be lists of one length")
    if not all(isinstance(value, int | float) for value in values):
        raise LabelError(f"{where}: {sign}_values must be numbers")
    return tuple(TokenScore(str(token), float(value)) for token, value in zip(tokens, values, strict=True))
