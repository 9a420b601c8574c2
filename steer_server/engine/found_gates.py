"""For which tokens of a forward conditions held, on its way from the device to the receipts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from steer_kernels.apply_edits import Gates, SiteEdits, StepTable
from steer_server.plan import CLOSED, OPEN


@dataclass(frozen=True)
class GatedTokens:
    """Tokens of one request that go through its gate in a forward.

    position: of the first of them in its sequence. start, stop: where they are in the batch. gate: its number.
    conditions: how many it has.
    """

    request_id: str
    position: int
    start: int
    stop: int
    gate: int
    conditions: int


def gated_tokens(conditions: SiteEdits, offset: npt.NDArray[np.int64], request_ids: Sequence[str]) -> list[GatedTokens]:
    """conditions: of a forward, their gates numbered as the requests are. offset: of each request's tokens in the batch
    from their positions."""
    gates, index, counts = np.unique(conditions.gate, return_index=True, return_counts=True)
    spans = zip(gates.tolist(), conditions.start[index].tolist(), conditions.stop[index].tolist(), strict=True)
    return [
        GatedTokens(request_ids[gate], start - int(offset[gate]), start, stop, gate, n)
        for (gate, start, stop), n in zip(spans, counts.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class FoundGates:
    """holds: [tokens, conditions] float32 on the host, not 0 where a condition holds, once `arrived`; None where it is
    there. rows: by request, which part of it is theirs, and the position of the first.
    """

    holds: torch.Tensor
    arrived: torch.cuda.Event | None
    rows: dict[str, tuple[int, slice, slice]]

    @staticmethod
    def in_table(table: StepTable, tokens: list[GatedTokens]) -> FoundGates:
        """Of the forward that was launched last with `table`. Conditions come first in the group of a request."""
        columns, end = max(t.conditions for t in tokens), max(t.stop for t in tokens)
        found = table.coefficients[: end * table.stride].view(end, table.stride)[:, :columns]
        rows = {t.request_id: (t.position, slice(t.start, t.stop), slice(0, t.conditions)) for t in tokens}
        return FoundGates(*_to_host(found), rows)

    @staticmethod
    def in_torch(gates: Gates, tokens: list[GatedTokens]) -> FoundGates:
        """Of the forward that the torch path edited last."""
        first = {t.request_id: int(gates.closed.first[t.gate]) for t in tokens}
        rows = {
            t.request_id: (t.position, slice(first[t.request_id] + t.start, first[t.request_id] + t.stop), slice(0, 1))
            for t in tokens
        }
        return FoundGates(*_to_host((gates.closed.failing == 0).float().unsqueeze(1)), rows)

    def said(self) -> dict[str, tuple[int, bytes]]:
        """By request: (first position, OPEN or CLOSED for it and those behind it). Waits for the forward."""
        if self.arrived is not None:
            self.arrived.synchronize()
        holds = self.holds.numpy() != 0
        return {
            request_id: (position, np.where(holds[tokens, columns].all(1), OPEN, CLOSED).astype(np.uint8).tobytes())
            for request_id, (position, tokens, columns) in self.rows.items()
        }


def _to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy, and when it is there: a GPU is not waited for."""
    on_gpu = values.device.type == "cuda"
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu).copy_(values, non_blocking=True)
    if not on_gpu:
        return host, None
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
