"""How strongly to steer with a feature, before trying."""

from __future__ import annotations

from dataclasses import dataclass

from sae_models.features.feature import Evidence, Feature

LEAST_SHARE, MOST_SHARE = 0.3, 0.9
"""Shares of the layer's mean residual norm that steering writes. About half of it steers best and much more breaks the
text: Hugging Face's Eiffel Tower Llama (November 2025), and this project's own demonstrations."""


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
