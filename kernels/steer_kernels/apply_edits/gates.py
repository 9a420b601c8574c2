"""Gates in the torch path: conditions are read at their sites, before any row that goes through them is written."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steer_kernels.apply_edits.closed import Closed
from steer_kernels.apply_edits.edits import IntArray, SiteEdits, TopKEncoder
from steer_kernels.apply_edits.groups import Groups, groups_of


class GateReads:
    """The conditions of all gates at one site. source: that site. gates: the numbers of theirs."""

    def __init__(self, source: int, gates: frozenset[int], groups: Groups, closed: Closed) -> None:
        self.source = source
        self.gates = gates
        self._groups = groups
        self._closed = closed
        self.ready = False
        """Whether the stream was read in this forward."""

    def read(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Find which conditions hold for the stream at `source`."""
        self._groups.count_failing(self._groups.coefficients(hidden, residual))
        self.ready = True

    def forget(self) -> None:
        """A forward begins. All sites are told before the first of them is read."""
        self.ready = False
        self._closed.failing.zero_()


@dataclass(frozen=True)
class Gates:
    """The gates of one forward. reads: by site."""

    closed: Closed
    reads: tuple[GateReads, ...]

    @staticmethod
    def of(conditions: SiteEdits, site: IntArray, rows: torch.Tensor, encoders: Sequence[TopKEncoder] = ()) -> Gates:
        """conditions: C rows that write nothing. site [C]: where each is read. rows, encoders: as for the edits."""
        closed = Closed.of(conditions, rows.device)
        reads = []
        for source in np.unique(site):
            part = conditions.take(site == source)
            gates = frozenset(part.gate.tolist())
            reads.append(GateReads(int(source), gates, groups_of(part, rows, encoders, closed), closed))
        return Gates(closed, tuple(reads))

    def reads_for(self, gates: Collection[int]) -> tuple[GateReads, ...]:
        """What must be read before rows that go through `gates` are written."""
        return tuple(reads for reads in self.reads if not reads.gates.isdisjoint(gates))
