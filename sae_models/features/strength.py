"""How strongly to steer with a feature, before trying."""

from __future__ import annotations

from dataclasses import dataclass

from sae_models.features.feature import Evidence, Feature

LEAST_SHARE, MOST_SHARE = 0.2, 0.5
"""Shares of the layer's mean residual norm that steering writes. Large models steer best at about half of it (Hugging
Face's Eiffel Tower Llama, November 2025); more breaks the text, and small models break sooner, as this project's
demonstrations show."""


@dataclass(frozen=True)
class StrengthRange:
    """Raw activations for the op `set` that are worth trying, lowest first."""

    low: float
    high: float


def suggested_strength(feature: Feature, evidence: Evidence) -> StrengthRange | None:
    """Activations whose part of the stream, activation times decoder norm, is a moderate share of the stream's norm.

    None where either norm is zero or unknown.
    """
    if not feature.decoder_norm or not evidence.mean_residual_norm:
        return None
    unit = evidence.mean_residual_norm / feature.decoder_norm
    return StrengthRange(round(LEAST_SHARE * unit, 1), round(MOST_SHARE * unit, 1))
