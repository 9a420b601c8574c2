"""The edit rows of the requests in a batch, and on which tokens of a forward they act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from steer_kernels.apply_edits import SiteEdits
from steer_server.engine.encoders import TOKEN_NORMS, Encoders
from steer_server.engine.row_bank import RowBank
from steer_server.plan import UNBOUNDED, Condition, Edit, EncoderRow, Plan


@dataclass(frozen=True)
class BatchEdits:
    """Edits of requests in a batch, and the conditions that they depend on, their rows in the bank.

    first, end: the positions of its sequence that an edit targets. site: where it acts, ascending; a condition, where
    it is read. owner: whose it is, as a place in the batch's steered requests, and the number of its gate. rows:
    everything else; its spans are filled in for each forward.
    """

    first: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    site: npt.NDArray[np.int64]
    owner: npt.NDArray[np.int64]
    rows: SiteEdits

    @staticmethod
    def of(
        plan: Plan, prompt_len: int, bank: RowBank, encoders: Encoders, site_number: Mapping[str, int]
    ) -> BatchEdits:
        """Those of one request, whose rows are in the bank."""
        asked: list[Edit | Condition] = [*plan.edits, *plan.when]
        intervals = [edit.target.interval(prompt_len) for edit in plan.edits] + [(0, UNBOUNDED)] * len(plan.when)
        first, end = np.array(intervals, dtype=np.int64).reshape(-1, 2).T
        read = np.array([-1 if row.read is None else bank.slot(row.read) for row in asked], dtype=np.int64)
        response = np.array(
            [(e.response.scale, e.response.shift, e.response.low, e.response.high) for e in plan.edits]
            + [(-1.0 if c.negated else 1.0, 0.0, c.bound, np.inf) for c in plan.when],
            dtype=np.float32,
        ).reshape(-1, 4)
        source = [-1 if e.read_site is None else site_number[e.read_site] for e in plan.edits] + [-1] * len(plan.when)
        write = [bank.slot(edit.write) for edit in plan.edits] + [-1] * len(plan.when)
        through = [encoders.number.get(r.read.sae, -1) if isinstance(r.read, EncoderRow) else -1 for r in asked]
        return BatchEdits(
            first=first,
            end=end,
            site=np.array([site_number[row.site] for row in asked], dtype=np.int64),
            owner=np.zeros(len(asked), dtype=np.int64),
            rows=SiteEdits(
                start=np.zeros(len(asked), dtype=np.int64),
                stop=np.zeros(len(asked), dtype=np.int64),
                read=read,
                write=np.array(write, dtype=np.int64),
                bias=bank.bias[read],
                threshold=bank.threshold[read],
                scale=response[:, 0],
                shift=response[:, 1],
                low=response[:, 2],
                high=response[:, 3],
                encoder=np.array(through, dtype=np.int64),
                feature=np.array([getattr(row.read, "feature", 0) for row in asked], dtype=np.int64),
                norm=np.array([TOKEN_NORMS[row.norm] for row in asked], dtype=np.int64),
                source=np.array(source, dtype=np.int64),
                preserve_norm=np.full(len(asked), plan.preserve_norm),
                gate=np.full(len(asked), 0 if plan.when else -1),
            ),
        )

    @staticmethod
    def concatenate(parts: list[BatchEdits]) -> BatchEdits:
        site = np.concatenate([part.site for part in parts])
        order = np.argsort(site, kind="stable")
        owner = np.repeat(np.arange(len(parts)), [len(part.first) for part in parts])[order]
        rows = SiteEdits.concatenate([part.rows for part in parts]).take(order)
        return BatchEdits(
            first=np.concatenate([part.first for part in parts])[order],
            end=np.concatenate([part.end for part in parts])[order],
            site=site[order],
            owner=owner,
            rows=replace(rows, gate=np.where(rows.gate < 0, -1, owner)),
        )

    def acting(
        self, start: npt.NDArray[np.int64], count: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The positions [first, end) that each acts on where a forward has `count` of each owner's from `start` on; of
        a condition, those from the first to the last that edits of its gate act on."""
        first = np.maximum(self.first, start[self.owner])
        end = np.minimum(self.end, (start + count)[self.owner])
        conditions = self.rows.is_condition
        if conditions.any():
            gated = (first < end) & (self.rows.gate >= 0) & ~conditions
            reach_first, reach_end = start + count, start.copy()
            np.minimum.at(reach_first, self.owner[gated], first[gated])
            np.maximum.at(reach_end, self.owner[gated], end[gated])
            first = np.where(conditions, reach_first[self.owner], first)
            end = np.where(conditions, reach_end[self.owner], end)
        return first, end
