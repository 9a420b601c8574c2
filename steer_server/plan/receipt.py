"""What was applied, from what the workers counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from steer_server.plan.plan import Target


@dataclass
class TokenSpans:
    """The positions of one sequence that a worker computed with the sequence's edits, as disjoint [start, end).

    A position is computed again after a preemption; it still counts once. What lies before the last span and in none
    of them came from the prefix cache, whose keys include the edits.
    """

    spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, end: int) -> None:
        if self.spans and self.spans[-1][0] <= start <= self.spans[-1][1]:
            self.spans[-1] = (self.spans[-1][0], max(end, self.spans[-1][1]))
            return
        merged: list[tuple[int, int]] = []
        for span in sorted([*self.spans, (start, end)]):
            if merged and span[0] <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], span[1]))
            else:
                merged.append(span)
        self.spans = merged

    @property
    def end(self) -> int:
        """The position after the last one computed."""
        return self.spans[-1][1] if self.spans else 0

    def count(self, first: int, end: int) -> int:
        """How many positions of [first, end) were computed."""
        return sum(max(0, min(end, stop) - max(first, start)) for start, stop in self.spans)


@dataclass(frozen=True)
class AppliedEntry:
    """One entry of a spec as carried out.

    tokens: tokens whose state was edited by a worker for this request. cached: prompt tokens whose edited state came
    from the prefix cache of an identical steering.
    """

    source: str
    op: str
    layers: tuple[int, ...]
    tokens: int
    cached: int


@dataclass(frozen=True)
class Receipt:
    """The `steering` object of a response."""

    applied: tuple[AppliedEntry, ...]
    fingerprint: str
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        return {
            "applied": [
                {"source": e.source, "op": e.op, "layers": list(e.layers), "tokens": e.tokens, "cached": e.cached}
                for e in self.applied
            ],
            "fingerprint": self.fingerprint,
            "warnings": list(self.warnings),
        }


def applied_tokens(target: Target, prompt_len: int, length: int, computed: TokenSpans) -> tuple[int, int]:
    """(tokens, cached) of an edit on a sequence whose first `length` positions were fed to the model.

    Their sum is the number of positions that the edit targets, provided that `computed` reaches `length`.
    """
    first, end = target.interval(prompt_len)
    end = min(end, length)
    tokens = computed.count(first, end)
    return tokens, max(0, end - first) - tokens
