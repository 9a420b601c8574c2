"""Random weights in which everything a loader can get wrong shows: no zero, no norm of one, ties, exact arithmetic."""

from __future__ import annotations

import numpy as np
import torch

D_IN = 16
D_SAE = 48

STEP = 1 / 1024
"""Everything is a multiple of this, so no processor's logarithm can change a weight."""

TIED = ((4, 5), (20, 21))
"""Pairs of features with equal encoder columns, biases and decoder norms: TopK cannot tell them apart."""

EXACT = 0
"""A feature whose pre-activation is exact in float32: its encoder column is a unit vector, its numbers are short."""

EXACT_BIAS = 0.25
EXACT_THRESHOLD = 0.5
EXACT_B_DEC = 0.375


def rounded(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((np.round(values / STEP) * STEP).astype(np.float32))


def random_weights(
    seed: int, *, d_in: int = D_IN, d_sae: int = D_SAE, d_out: int | None = None, mean_bias: float = 0.0
) -> dict[str, torch.Tensor]:
    """Every tensor that some architecture has, by SAELens' names, float32.

    W_enc [d_in, d_sae], W_dec [d_sae, d_out], W_skip [d_out, d_in], b_dec [d_out], the others [d_sae].
    mean_bias: of b_enc. Below zero, some inputs leave fewer than k features active.
    """
    d_out = d_in if d_out is None else d_out
    random = np.random.Generator(np.random.PCG64(seed))
    W_dec = random.standard_normal((d_sae, d_out))
    W_dec *= random.uniform(0.5, 2.0, (d_sae, 1)) / np.linalg.norm(W_dec, axis=1, keepdims=True)
    weights = {
        "W_enc": random.standard_normal((d_in, d_sae)) / d_in**0.5,
        "W_dec": W_dec,
        "W_skip": 0.2 * random.standard_normal((d_out, d_in)),
        "b_enc": 0.3 * random.standard_normal(d_sae) + mean_bias,
        "b_dec": 0.5 * random.standard_normal(d_out),
        "b_gate": 0.3 * random.standard_normal(d_sae),
        "b_mag": 0.3 * random.standard_normal(d_sae),
        "r_mag": 0.3 * random.standard_normal(d_sae),
        "threshold": random.uniform(0.1, 0.9, d_sae),
    }
    for first, second in TIED:
        weights["W_enc"][:, second] = weights["W_enc"][:, first]
        weights["W_dec"][second] = -weights["W_dec"][first]
        weights["b_enc"][second] = weights["b_enc"][first]
    weights["W_enc"][:, EXACT] = 0.0
    weights["W_enc"][0, EXACT] = 1.0
    weights["W_dec"][EXACT] = 0.0
    weights["W_dec"][EXACT, 1] = 2.0
    weights["b_enc"][EXACT] = weights["b_gate"][EXACT] = EXACT_BIAS
    weights["b_mag"][EXACT] = 0.5
    weights["b_dec"][0] = EXACT_B_DEC
    weights["threshold"][EXACT] = EXACT_THRESHOLD
    return {name: rounded(values) for name, values in weights.items()}
