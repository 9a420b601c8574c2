"""Admission control for a row bank that an operator made smaller than every batch could need."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque

from steer_server.plan import RowRef
from steer_server.spec import SteeringError

RETRY_AFTER_SECONDS = 1


class Lease:
    """The right of one admitted request to its rows; given back by `release`, or when nothing holds it any more."""

    def __init__(self, budget: RowBudget, rows: frozenset[RowRef]) -> None:
        self._finalizer = weakref.finalize(self, budget._ended.append, rows)
        self._finalizer.atexit = False

    def release(self) -> None:
        self._finalizer()


class RowBudget:
    """Counts the distinct rows of all admitted requests; equal rows are one, whoever asked for them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._users: Counter[RowRef] = Counter()
        # A lease may end in a garbage collection, at any instruction, one that counts included. So ending one is no
        # more than an append, and whoever counts next takes it off.
        self._ended: deque[frozenset[RowRef]] = deque()
        self._lock = threading.Lock()

    def lease(self, rows: frozenset[RowRef], root: str) -> Lease:
        """Reserve `rows`. Raises SteeringError with status 429 where they do not fit beside those in use."""
        with self._lock:
            self._take_off_ended()
            missing = sum(1 for row in rows if row not in self._users)
            if len(self._users) + missing > self._capacity:
                raise SteeringError(
                    f"{root} needs {missing} more rows of steering memory; {len(self._users)} of {self._capacity} are "
                    "in use. Retry when running requests have finished",
                    root,
                    status=429,
                    retry_after=RETRY_AFTER_SECONDS,
                )
            self._users.update(rows)
        return Lease(self, rows)

    @property
    def in_use(self) -> int:
        with self._lock:
            self._take_off_ended()
            return len(self._users)

    def _take_off_ended(self) -> None:
        while self._ended:
            for row in self._ended.popleft():
                self._users[row] -= 1
                if self._users[row] == 0:
                    del self._users[row]
