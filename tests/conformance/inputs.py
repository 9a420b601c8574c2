"""Activations to encode: like data, and at the edges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests.conformance.weights import EXACT_B_DEC, EXACT_BIAS, STEP, TIED, rounded


@dataclass(frozen=True)
class Inputs:
    """x [n, d_in] float32; rows: kind of input to its first row and the row after its last."""

    x: torch.Tensor
    rows: dict[str, tuple[int, int]]


def make_inputs(
    seed: int,
    W_enc: torch.Tensor,
    *,
    threshold: float = 0.0,
    subtracts_b_dec: bool = True,
    scale: float = 1.0,
    zeros: bool = True,
) -> Inputs:
    """48 rows like data, then the edges, in the units in which the published SAE is fed.

    W_enc: [d_in, d_sae], to aim at the tied features.
    threshold, subtracts_b_dec, scale: where the pre-activation of the exact feature, `scale * x[0] - b_dec[0] +
        b_enc[0]`, meets its threshold. `scale` must be a power of two.
    zeros: without it no row of zeros, which a normalisation by the norm divides by.
    """
    d_in = W_enc.shape[0]
    random = np.random.Generator(np.random.PCG64(1000 + seed))
    kinds: dict[str, torch.Tensor] = {"random": rounded(2.0 * random.standard_normal((48, d_in)) + 0.1)}
    if zeros:
        kinds["zeros"] = torch.zeros(1, d_in)
    at = (threshold - EXACT_BIAS + (EXACT_B_DEC if subtracts_b_dec else 0.0)) / scale
    kinds["at_threshold"] = torch.zeros(3, d_in)
    kinds["at_threshold"][:, 0] = torch.tensor([at, at + STEP, at - STEP])
    (first, _), (second, _) = TIED
    u, v = (W_enc[:, i].double().numpy() / np.sum(W_enc[:, i].double().numpy() ** 2) for i in (first, second))
    kinds["ties"] = rounded(np.stack([8 * u + 6 * v, 6 * u + 8 * v, 8 * u]) / scale)
    kinds["tiny"] = rounded(random.standard_normal((2, d_in))) * STEP
    kinds["large"] = rounded(random.standard_normal((2, d_in))) * 1024
    rows, first_row = {}, 0
    for kind, x in kinds.items():
        rows[kind] = (first_row, first_row + len(x))
        first_row += len(x)
    return Inputs(torch.cat(list(kinds.values())), rows)
