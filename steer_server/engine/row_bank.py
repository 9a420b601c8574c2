"""The rows in use, in one tensor on the model's device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
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

    def acquire(self, refs: Set[RowRef], read: Callable[[RowRef], Row]) -> None:
        """Count one more user of each row, uploading with `read` those that are not here, all in one go.

        Raises RuntimeError, and changes nothing, where they do not fit beside the rows in use.
        """
        missing = {ref: read(ref) for ref in refs if ref not in self._slots}
        kept = sum(ref in self._idle for ref in refs)
        if len(missing) > len(self._free) + len(self._idle) - kept:
            raise RuntimeError(
                f"the row bank is full with {len(self._users)} rows in use; admission should have prevented this"
            )
        # All that are here are in use before a place is taken, which could be one of theirs.
        for ref in refs:
            self._idle.pop(ref, None)
            self._users[ref] = self._users.get(ref, 0) + 1
        for ref, row in missing.items():
            slot = self._slots[ref] = self._take_slot()
            self.bias[slot], self.threshold[slot] = row.bias, row.threshold
        if missing:
            self._upload([self._slots[ref] for ref in missing], [row.values for row in missing.values()])

    def _upload(self, slots: list[int], values: list[torch.Tensor]) -> None:
        """Write `values` to `slots`. A GPU is not waited for: one copy from pinned memory, then a scatter there."""
        device = self.rows.device
        on_gpu = device.type == "cuda"
        staged = torch.empty(len(slots), self.rows.shape[1], dtype=self.rows.dtype, pin_memory=on_gpu)
        for row, value in zip(staged, values, strict=True):
            row.copy_(value)
        places = torch.tensor(slots, pin_memory=on_gpu)
        self.rows[places.to(device, non_blocking=True)] = staged.to(device, non_blocking=True)

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
        oldest, _ = self._idle.popitem(last=False)
        return self._slots.pop(oldest)
