"""For which tokens of a forward conditions held, on its way from the device to the receipts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steer_kernels.apply_edits import Gates, SiteEdits, StepTable
from steer_kernels.apply_edits.edits import IntArray
from steer_server.engine.host_copy import HostCopy
from steer_server.plan import CLOSED, OPEN


@dataclass(frozen=True)
class GatedTokens:
    """The tokens of a forward that go through gates, request by request, as parallel arrays.

    start, stop: where a request's are in the batch. gate: its number. conditions: how many it has.
    """

    request_ids: list[str]
    start: IntArray
    stop: IntArray
    gate: IntArray
    conditions: IntArray

    @staticmethod
    def of(conditions: SiteEdits, request_ids: Sequence[str]) -> GatedTokens:
        """conditions: those of the forward, their gates numbered as the requests are."""
        gate, index, count = np.unique(conditions.gate, return_index=True, return_counts=True)
        ids = [request_ids[i] for i in gate.tolist()]
        return GatedTokens(ids, conditions.start[index], conditions.stop[index], gate, count)


@dataclass(frozen=True)
class FoundGates:
    """holds: [tokens, conditions] float32, not 0 where a condition holds. first, end: by request, which rows are its
    tokens'; conditions: how many columns are its own. position: that of its first token in its sequence.
    """

    holds: HostCopy
    request_ids: list[str]
    position: IntArray
    first: IntArray
    end: IntArray
    conditions: IntArray

    @staticmethod
    def in_table(table: StepTable, tokens: GatedTokens, position: IntArray) -> FoundGates:
        """Of the forward that was launched last with `table`. Conditions come first in the group of a request."""
        columns, end = int(tokens.conditions.max()), int(tokens.stop.max())
        found = table.coefficients[: end * table.stride].view(end, table.stride)[:, :columns]
        rows = (tokens.start, tokens.stop, tokens.conditions)
        return FoundGates(HostCopy.of(found), tokens.request_ids, position, *rows)

    @staticmethod
    def in_torch(gates: Gates, tokens: GatedTokens, position: IntArray) -> FoundGates:
        """Of the forward that the torch path edited last."""
        found = (gates.closed.failing == 0).float().unsqueeze(1)
        first = gates.closed.first[tokens.gate]
        rows = (first + tokens.start, first + tokens.stop, np.ones_like(first))
        return FoundGates(HostCopy.of(found), tokens.request_ids, position, *rows)

    def said(self) -> dict[str, tuple[int, bytes]]:
        """By request: (first position, OPEN or CLOSED for it and those behind it). Waits for the forward."""
        holds = self.holds.values().numpy() != 0
        # Nearly always all requests have as many conditions.
        said = {
            n: np.where(holds[:, :n].all(axis=1), OPEN, CLOSED).astype(np.uint8).tobytes()
            for n in np.unique(self.conditions).tolist()
        }
        rows = zip(self.first.tolist(), self.end.tolist(), self.conditions.tolist(), strict=True)
        return {
            request_id: (position, said[n][first:end])
            for request_id, position, (first, end, n) in zip(
                self.request_ids, self.position.tolist(), rows, strict=True
            )
        }
