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

    def within(self, first: int, end: int) -> list[tuple[int, int]]:
        """The parts of [first, end) that were computed."""
        parts = [(max(first, start), min(end, stop)) for start, stop in self.spans]
        return [(start, stop) for start, stop in parts if start < stop]

    def count(self, first: int, end: int) -> int:
        """How many positions of [first, end) were computed."""
        return sum(stop - start for start, stop in self.within(first, end))


OPEN, CLOSED = 1, 2
"""What a worker says of a token: whether all conditions held."""


class GateRecord:
    """For which positions of a sequence its conditions held, as the workers last computed them."""

    def __init__(self) -> None:
        self._said = bytearray()

    def add(self, first: int, said: bytes) -> None:
        """said: OPEN or CLOSED, for the positions from `first` on."""
        end = first + len(said)
        self._said.extend(bytes(max(0, end - len(self._said))))
        self._said[first:end] = said

    def count(self, spans: list[tuple[int, int]]) -> tuple[int, int]:
        """(open, closed) positions of disjoint spans. Raises ValueError for one of which nothing was said."""
        n_open = sum(self._said.count(OPEN, start, end) for start, end in spans)
        n_closed = sum(self._said.count(CLOSED, start, end) for start, end in spans)
        silent = sum(end - start for start, end in spans) - n_open - n_closed
        if silent:
            raise ValueError(f"conditions were not evaluated for {silent} of the tokens that were computed")
        return n_open, n_closed


@dataclass(frozen=True)
class AppliedEntry:
    """One entry of a spec as carried out.

    tokens: tokens whose state was edited by a worker for this request. closed: those that were not, since a condition
    did not hold; None where the spec has no conditions. cached: prompt tokens whose state came from the prefix cache of
    an identical steering.
    """

    source: str
    op: str
    layers: tuple[int, ...]
    tokens: int
    cached: int
    closed: int | None = None

    def as_json(self) -> dict[str, object]:
        line: dict[str, object] = {
            "source": self.source, "op": self.op, "layers": list(self.layers), "tokens": self.tokens,
            "cached": self.cached,
        }  # fmt: skip
        return line if self.closed is None else line | {"closed": self.closed}


@dataclass(frozen=True)
class Receipt:
    """The `steering` object of a response."""

    applied: tuple[AppliedEntry, ...]
    fingerprint: str
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        return {
            "applied": [entry.as_json() for entry in self.applied],
            "fingerprint": self.fingerprint,
            "warnings": list(self.warnings),
        }


@dataclass
class TokenCounts:
    """Of one entry: tokens, closed and cached are those of AppliedEntry."""

    tokens: int = 0
    closed: int = 0
    cached: int = 0

    def add(self, other: TokenCounts) -> None:
        self.tokens += other.tokens
        self.closed += other.closed
        self.cached += other.cached


def applied_tokens(
    target: Target, prompt_len: int, length: int, computed: TokenSpans, gate: GateRecord | None = None
) -> TokenCounts:
    """What became of an edit on a sequence whose first `length` positions were fed to the model.

    The sum of all three is the number of positions that the edit targets, provided that `computed` reaches `length`.
    gate: None where the spec has no conditions. Raises ValueError for positions of which it does not know.
    """
    first, end = target.interval(prompt_len)
    end = min(end, length)
    reached = computed.count(first, end)
    tokens, closed = (reached, 0) if gate is None else gate.count(computed.within(first, end))
    return TokenCounts(tokens, closed, max(0, end - first) - reached)
