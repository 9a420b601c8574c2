"""Random and structured parameters of every architecture, for its definition and for its canonical form."""

from dataclasses import dataclass, field
from typing import Any

import torch

D_SAE = 12


@dataclass(frozen=True)
class Case:
    """defining, canonical: keyword arguments of `activations` and of `canonical`. scores: of a router [n, groups]."""

    defining: dict[str, Any]
    canonical: dict[str, Any]
    scores: torch.Tensor | None = None
    tied: bool = field(default=False)
    """Equal pre-activations may be at the place where selection ends."""


class Draw:
    """Numbers for a case. grid: multiples of 1/4 in [-2, 2], so that exact thresholds, ties and zeros are common, and
    sums and products are exact; else from a normal distribution."""

    def __init__(self, seed: int, grid: bool, n: int = 16):
        self.generator = torch.Generator().manual_seed(seed)
        self.grid, self.n = grid, n

    def __call__(self, *shape):
        if self.grid:
            return torch.randint(-8, 9, shape, generator=self.generator).double() / 4
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def among(self, *values):
        return values[int(torch.randint(len(values), (), generator=self.generator))]


def _bias(draw):
    values = {"b_enc": draw(D_SAE)}
    return Case(values, values)


def _gated(draw):
    # On the grid, exp(0) keeps products exact.
    r_mag = torch.zeros(D_SAE, dtype=torch.float64) if draw.grid else draw(D_SAE)
    values = {"b_gate": draw(D_SAE), "r_mag": r_mag, "b_mag": draw(D_SAE)}
    return Case(values, values)


def _jumprelu(draw):
    values = {"b_enc": draw(D_SAE), "threshold": draw(D_SAE)}
    return Case(values, values)


def _batchtopk(draw):
    values = {"b_enc": draw(D_SAE), "threshold": draw.among(-1.0, 0.0, 0.25, 1.0)}
    return Case(values, values)


def _matryoshka(draw):
    values = _batchtopk(draw).defining | {"group_sizes": [2, 3, 7], "active_groups": draw.among(1, 2, 3)}
    return Case(values, values)


def _topk(draw):
    values = {"b_enc": draw(D_SAE), "k": draw.among(1, 3, D_SAE)}
    return Case(values, values, tied=draw.grid)


def _groupmax(draw):
    values = {"b_enc": draw(D_SAE), "k": draw.among(1, 3, D_SAE)}
    return Case(values, values, tied=draw.grid)


def _switch(draw):
    experts = draw.among(1, 3)
    # Scores without ties: which of two equal experts is first is for nobody to say.
    scores = torch.randn(draw.n, experts, generator=draw.generator, dtype=torch.float64)
    values = {"b_enc": draw(D_SAE), "k": draw.among(1, 2, D_SAE // experts)}
    return Case(values | {"scores": scores}, values | {"experts": experts}, scores, tied=draw.grid)


CASES = {
    "relu": _bias,
    "gated": _gated,
    "jumprelu": _jumprelu,
    "prolu": _bias,
    "topk": _topk,
    "abstopk": _topk,
    "batchtopk": _batchtopk,
    "matryoshka": _matryoshka,
    "groupmax": _groupmax,
    "hierarchical_topk": _topk,
    "switch": _switch,
}
