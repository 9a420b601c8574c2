"""Maps around an SAE that its rows can take in, in float64.

An SAE trained on z = x A + c instead of x itself, whose reconstruction is x = y B + d for its output y, is an SAE on x:
pre-activations are z . w = x . (A w) + c . w, and what a feature writes is its decoder row times B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AffineMap:
    """v -> v matrix + shift for row vectors. matrix: [n, n], or a number for a multiple of the identity.

    shift: [n], or None for zero. float64.
    """

    matrix: torch.Tensor | float = 1.0
    shift: torch.Tensor | None = None

    def linear(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [m, n] times the matrix."""
        return rows * self.matrix if isinstance(self.matrix, float) else rows @ self.matrix

    def transposed(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [m, n] times the matrix transposed: what reads `v matrix` along w reads v along this."""
        return rows * self.matrix if isinstance(self.matrix, float) else rows @ self.matrix.T

    def offset(self, rows: torch.Tensor) -> torch.Tensor | float:
        """shift . w for each of rows [m, n]: [m]."""
        return 0.0 if self.shift is None else rows @ self.shift

    def apply(self, v: torch.Tensor) -> torch.Tensor:
        mapped = self.linear(v)
        return mapped if self.shift is None else mapped + self.shift

    def then_subtract(self, vector: torch.Tensor) -> AffineMap:
        """This map, and then minus `vector` [n]: how b_dec is taken from an SAE's input."""
        return AffineMap(self.matrix, -vector if self.shift is None else self.shift - vector)


IDENTITY = AffineMap()


def scaled(factor: float) -> AffineMap:
    return AffineMap(float(factor))


def whitening(mean: torch.Tensor, matrix: torch.Tensor, inverse: torch.Tensor) -> tuple[AffineMap, AffineMap]:
    """(into, out of) the whitened space z = (x - mean) matrix, x = z inverse + mean (arXiv 2511.13981)."""
    mean, matrix, inverse = mean.double(), matrix.double(), inverse.double()
    return AffineMap(matrix, -(mean @ matrix)), AffineMap(inverse, mean)
