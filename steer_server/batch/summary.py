"""What a job did, in numbers."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from steer_server.batch.rows import Result

MAX_KINDS = 100
OTHER = "other"


@dataclass
class Summary:
    """Counts of the rows that this run finished, beside those that earlier runs had.

    prompt_tokens, completion_tokens, steered_tokens: of this run's answers. failures: rows of this run by kind.
    """

    finished_earlier: int = 0
    failed_earlier: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    steered_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    _start: float = field(default_factory=time.monotonic)
    _end: float | None = None

    def add(self, result: Result) -> None:
        if result.failure is None:
            self.answered += 1
        else:
            known = result.failure in self.failures or len(self.failures) < MAX_KINDS
            self.failures[result.failure if known else OTHER] += 1
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens
        self.steered_tokens += result.steered_tokens

    def start(self) -> None:
        """From now on: what came before was starting an engine."""
        self._start = time.monotonic()

    def stop(self) -> None:
        self._end = time.monotonic()

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self._end is None else self._end) - self._start

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def finished(self) -> int:
        """Rows of this run."""
        return self.answered + self.failed

    def as_json(self) -> dict[str, object]:
        seconds = max(self.seconds, 1e-9)
        return {
            "rows": self.finished_earlier + self.finished,
            "finished_earlier": self.finished_earlier,
            "finished_now": self.finished,
            "failed": self.failed_earlier + self.failed,
            "failed_now": self.failed,
            "failures": dict(self.failures.most_common()),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "steered_tokens": self.steered_tokens,
            "seconds": round(seconds, 3),
            "rows_per_second": round(self.finished / seconds, 3),
            "tokens_per_second": round((self.prompt_tokens + self.completion_tokens) / seconds, 3),
            "completion_tokens_per_second": round(self.completion_tokens / seconds, 3),
        }
