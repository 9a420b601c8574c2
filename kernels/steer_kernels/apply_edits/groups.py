"""Edits that read one stream, sorted into what the torch path runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from steer_kernels.apply_edits.batch_tokens import one_row_a_token
from steer_kernels.apply_edits.closed import Closed, only_open
from steer_kernels.apply_edits.edits import IntArray, SiteEdits, TokenNorm, TopKEncoder
from steer_kernels.apply_edits.pairs import ConstantPairs, MemberPairs, ReadPairs
from steer_kernels.apply_edits.spans import Span, SpanReads
from steer_kernels.apply_edits.token_norm import scaled

MIN_SPAN = 8
"""Tokens from which on a matrix product for a span costs less than rows beside each other."""


@dataclass(frozen=True)
class Groups:
    """Edits that read one stream, sorted into what the torch path runs."""

    constants: ConstantPairs | None
    reads: tuple[ReadPairs, ...]
    members: tuple[MemberPairs, ...]
    spans: tuple[Span, ...]

    @property
    def reads_stream(self) -> bool:
        return bool(self.reads) or bool(self.members) or any(span.reads is not None for span in self.spans)

    def coefficients(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> list[torch.Tensor]:
        """What each group that reads multiplies its rows by, from the stream that it reads."""
        found = []
        for pairs in self.reads:
            x, s = scaled(pairs.tokens.stream(hidden, residual), pairs.norm)
            found.append(pairs.response.coefficient(pairs.response.activation(pairs.pre_acts(x)), s))
        for group in self.members:
            x, s = scaled(group.distinct.stream(hidden, residual), group.pairs.norm)
            f = group.activations(x)
            s = None if s is None else s.index_select(0, group.slot)
            found.append(group.pairs.response.coefficient(f, s))
        for span in self.spans:
            if span.reads is not None:
                found.append(span.reads.coefficient(span.stream(hidden, residual)))
        return found

    def write(self, total: torch.Tensor, coefficients: list[torch.Tensor]) -> None:
        """Add every row's part to total [tokens, d_model], float32."""
        if self.constants is not None:
            self.constants.tokens.add_to(total, self.constants.delta)
        left = iter(coefficients)
        for pairs in self._pairs():
            pairs.tokens.add_scaled(total, pairs.write, only_open(next(left), pairs.places))
        for span in self.spans:
            part = total[span.start : span.stop]
            if span.reads is not None:
                part.addmm_(only_open(next(left), span.reads.places), span.reads.write)
            if span.constant is not None:
                part.add_(span.constant)

    def count_failing(self, coefficients: list[torch.Tensor]) -> None:
        """Of conditions: count for their gates those that do not hold."""
        spans = (span.reads for span in self.spans if span.reads is not None)
        reads: list[ReadPairs | SpanReads] = [*self._pairs(), *spans]
        for part, failing in zip(reads, coefficients, strict=True):
            assert part.places is not None
            part.places.count(failing)

    def _pairs(self) -> tuple[ReadPairs, ...]:
        return *self.reads, *(group.pairs for group in self.members)


def by_kind(edits: SiteEdits, encoders: Sequence[TopKEncoder], *columns: IntArray) -> list[IntArray]:
    """Where the edits are of one token norm, one group of one encoder, and equal in the given columns."""
    group = np.zeros(len(edits), dtype=np.int64)
    for number in np.unique(edits.encoder[edits.encoder >= 0]):
        through = edits.encoder == number
        group[through] = edits.feature[through] // encoders[number].group_size
    kinds = np.stack([*columns, edits.norm, edits.encoder, group], axis=1)
    _, kind = np.unique(kinds, axis=0, return_inverse=True)
    return [np.flatnonzero(kind.ravel() == i) for i in range(int(kind.max()) + 1)]


def split(edits: SiteEdits, mask: npt.NDArray[np.bool_]) -> tuple[SiteEdits | None, SiteEdits | None]:
    """(rows where the mask holds, the others), None for none: most tables have one kind of row, which is not copied."""
    if bool(mask.all()):
        return edits, None
    return (edits.take(mask), edits.take(~mask)) if bool(mask.any()) else (None, edits)


def groups_of(
    edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder], closed: Closed | None = None
) -> Groups:
    """closed: of the gates that the edits go through, or are conditions of."""
    varies = (edits.read < 0) & ((edits.norm != TokenNorm.NONE) | (edits.gate >= 0))
    if bool(varies.any()):
        # What they write depends on the stream though they read no feature: to the torch path, one never on.
        edits = replace(
            edits,
            read=np.where(varies, edits.write, edits.read),
            threshold=np.where(varies, np.float32(np.inf), edits.threshold),
        )
    long, short = split(edits, edits.stop - edits.start >= MIN_SPAN)
    members, others = split(short, short.encoder >= 0) if short is not None else (None, None)
    constants = reads = None
    if others is not None:
        pairs = one_row_a_token(others)
        constants, reads = split(pairs, pairs.read < 0)
    read_pairs: tuple[ReadPairs, ...] = ()
    if reads is not None:
        norms = np.unique(reads.norm)
        parts = [reads] if len(norms) == 1 else [reads.take(reads.norm == norm) for norm in norms]
        read_pairs = tuple(ReadPairs.of(part, rows, closed) for part in parts)
    member_pairs: tuple[MemberPairs, ...] = ()
    if members is not None:
        members = one_row_a_token(members)
        member_pairs = tuple(
            MemberPairs.of(members.take(kind), rows, encoders, closed) for kind in by_kind(members, encoders)
        )
    spans: tuple[Span, ...] = ()
    if long is not None:
        spans = tuple(
            Span.of(long.take(kind), rows, encoders, closed) for kind in by_kind(long, encoders, long.start, long.stop)
        )
    return Groups(
        constants=None if constants is None else ConstantPairs.of(constants, rows),
        reads=read_pairs,
        members=member_pairs,
        spans=spans,
    )


NOTHING = Groups(constants=None, reads=(), members=(), spans=())
