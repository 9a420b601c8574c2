"""A feature in a few words, as search results give it."""

from __future__ import annotations

from typing import Any

from sae_models.features.feature import Evidence, Feature
from sae_models.features.strength import suggested_strength


def summary(feature: Feature, evidence: Evidence) -> dict[str, Any]:
    """JSON-able, without contexts and tokens. `suggested` are values for the op `set`."""
    strength = suggested_strength(feature, evidence)
    return {
        "index": feature.index,
        "label": feature.label,
        "label_source": feature.label_source,
        "max_activation": feature.max_activation,
        "density": feature.density,
        "suggested": None if strength is None else {"op": "set", "low": strength.low, "high": strength.high},
    }
