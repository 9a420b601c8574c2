"""The rows in use, in one tensor on the model's device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from steer_server.plan import RowRef


@dataclass(frozen=True)
class Row:
    """values: [d_model] float32. bias, threshold: of the activation that reading along the row goes through."""

    values: torch.Tensor
    bias: float = 0.0
    threshold: float = float("-inf")


class RowBank:
    """Reference-counted rows. A row that nobody uses stays until its place is needed, so that popular features are
    uploaded once.

    rows: [capacity, d_model] in the model's dtype. bias, threshold: [capacity], beside the rows they belong to.
    """

    def __init__(self, capacity: int, d_model: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(capacity, d_model, dtype=dtype, device=device)
        self.bias = np.zeros(capacity, dtype=np.float32)
        self.threshold = np.zeros(capacity, dtype=np.float32)
        self._slots: dict[RowRef, int] = {}
        self._users: dict[RowRef, int] = {}
        self._idle: OrderedDict[RowRef, None] = OrderedDict()
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        """Rows that someone uses."""
        return len(self._users)

    @property
    def nbytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()

    def slot(self, ref: RowRef) -> int:
        """Where an acquired row lies."""
        return self._slots[ref]

    def acquire(self, refs: Iterable[RowRef], read: Callable[[RowRef], Row]) -> None:
        """Count one more user of each row, uploading with `read` those that are not here."""
        for ref in refs:
            if ref not in self._slots:
                slot = self._take_slot()
                row = read(ref)
                self.rows[slot].copy_(row.values)
                self.bias[slot], self.threshold[slot] = row.bias, row.threshold
                self._slots[ref] = slot
            self._idle.pop(ref, None)
            self._users[ref] = self._users.get(ref, 0) + 1

    def release(self, refs: Iterable[RowRef]) -> None:
        """Count one user of each row less."""
        for ref in refs:
            self._users[ref] -= 1
            if self._users[ref] == 0:
                del self._users[ref]
                self._idle[ref] = None

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        if not self._idle:
            raise RuntimeError(
                f"the row bank is full with {len(self._users)} rows in use; admission should have prevented this"
            )
        oldest, _ = self._idle.popitem(last=False)
        return self._slots.pop(oldest)
