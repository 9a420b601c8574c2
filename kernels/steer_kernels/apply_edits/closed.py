"""On which tokens gates are closed, as the torch path and the kernel compiled for CPUs look it up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from steer_kernels.apply_edits.edits import IntArray, SiteEdits


@dataclass(frozen=True)
class Closed:
    """failing: float32, how many conditions of a gate do not hold for a token; failing[0] stays 0, and is where rows
    without a gate look. first: by gate, where in it token 0 of the batch would be.
    """

    failing: torch.Tensor
    first: IntArray

    @staticmethod
    def of(conditions: SiteEdits, device: torch.device) -> Closed:
        """With room for the gates that `conditions` make up."""
        n_gates = int(conditions.gate.max()) + 1
        start = np.full(n_gates, np.iinfo(np.int64).max)
        np.minimum.at(start, conditions.gate, conditions.start)
        stop = np.zeros(n_gates, dtype=np.int64)
        np.maximum.at(stop, conditions.gate, conditions.stop)
        # Numbers that no condition has take no room.
        start = np.minimum(start, stop)
        ends = 1 + np.cumsum(stop - start)
        return Closed(torch.zeros(int(ends[-1]), device=device), ends - stop)

    def places(self, gate: IntArray, token: IntArray) -> IntArray:
        """Where in `failing` rows that go through `gate` find `token`."""
        return np.where(gate < 0, 0, self.first[gate] + token)


@dataclass(frozen=True)
class Places:
    """Where some rows find whether their gates are closed. index: into `closed.failing`, of the coefficients' shape."""

    closed: Closed
    index: torch.Tensor

    @staticmethod
    def of(closed: Closed | None, gate: IntArray, token: IntArray) -> Places | None:
        """Of rows that go through `gate`, each on its `token`, or [n] on all of `token` [tokens, 1]. None where none
        goes through any."""
        if closed is None or bool((gate < 0).all()):
            return None
        return Places(closed, torch.from_numpy(closed.places(gate, token)).to(closed.failing.device))

    def closed_ones(self) -> torch.Tensor:
        """Where a gate is closed, bool."""
        return self.closed.failing[self.index] > 0

    def count(self, failing: torch.Tensor) -> None:
        """Count conditions that do not hold: failing, 1 or 0 for each."""
        self.closed.failing.index_add_(0, self.index.flatten(), failing.flatten())


def only_open(coefficients: torch.Tensor, places: Places | None) -> torch.Tensor:
    """`coefficients`, which are overwritten, 0 where a gate is closed."""
    return coefficients if places is None else coefficients.masked_fill_(places.closed_ones(), 0.0)
