"""The path in plain torch operations, fast on CPU.

What does not depend on the stream is computed when a step table is prepared and reused while the table lasts, which is
most of decoding. Edits of one token become rows beside each other (decode, `pairs`); edits of many tokens become small
matrix products over a slice (prefill, `spans`). What differs by kind of row (the encoder, the token norm) is decided
when the table is prepared: rows of one kind are one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from steer_kernels.apply_edits.batch_tokens import Tokens, one_row_a_token
from steer_kernels.apply_edits.edits import IntArray, SiteEdits, TokenNorm, TopKEncoder, stream_limit
from steer_kernels.apply_edits.pairs import ConstantPairs, MemberPairs, ReadPairs
from steer_kernels.apply_edits.spans import Span, SpanReads
from steer_kernels.apply_edits.token_norm import scaled

if TYPE_CHECKING:
    from steer_kernels.apply_edits.cpu_kernel import TokenEdits

MIN_SPAN = 8
"""Tokens from which on a matrix product for a span costs less than rows beside each other."""


@dataclass(frozen=True)
class _Groups:
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
            found.append(pairs.coefficient(pairs.response.activation(pairs.pre_acts(x)), s))
        for group in self.members:
            x, s = scaled(group.distinct.stream(hidden, residual), group.pairs.norm)
            f = group.activations(x)
            found.append(group.pairs.coefficient(f, None if s is None else s.index_select(0, group.slot)))
        for span in self.spans:
            if span.reads is not None:
                found.append(span.reads.coefficient(span.stream(hidden, residual)))
        return found

    def write(self, total: torch.Tensor, coefficients: list[torch.Tensor]) -> None:
        """Add every row's part to total [tokens, d_model], float32."""
        if self.constants is not None:
            self.constants.tokens.add_to(total, self.constants.delta)
        left = iter(coefficients)
        for pairs in (*self.reads, *(group.pairs for group in self.members)):
            pairs.tokens.add_scaled(total, pairs.write, next(left))
        for span in self.spans:
            part = total[span.start : span.stop]
            if span.reads is not None:
                part.addmm_(next(left), span.reads.write)
            if span.constant is not None:
                part.add_(span.constant)


class RemoteReads:
    """What the edits of one site read at another, which runs earlier in the same forward.

    source: the site that is read.
    """

    def __init__(self, source: int, groups: _Groups) -> None:
        self.source = source
        self._groups = groups
        self._coefficients: list[torch.Tensor] | None = None

    @property
    def ready(self) -> bool:
        """Whether the stream was read and nothing was written with it yet."""
        return self._coefficients is not None

    def read(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Leave behind what `write` needs of the stream at `source`."""
        self._coefficients = self._groups.coefficients(hidden, residual)

    def forget(self) -> None:
        self._coefficients = None

    def write(self, total: torch.Tensor) -> None:
        if self._coefficients is None:
            raise RuntimeError(f"site {self.source} was not read in this forward")
        self._groups.write(total, self._coefficients)
        self._coefficients = None


@dataclass(frozen=True)
class PreparedEdits:
    """SiteEdits sorted into the groups that the torch path runs. remote: those that read another site. compiled: all of
    them instead, where the compiled kernel has what they need."""

    local: _Groups
    remote: tuple[RemoteReads, ...]
    norm_tokens: Tokens | None
    first_token: int
    last_token: int
    compiled: TokenEdits | None = None

    @property
    def reads_stream(self) -> bool:
        """Whether any edit depends on a stream, so that edits can compound from layer to layer."""
        return bool(self.remote) or self.local.reads_stream

    @property
    def ready(self) -> bool:
        """Whether everything that is read at other sites was read in this forward."""
        return all(reads.ready for reads in self.remote)

    def apply(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """`apply_prepared` of these edits."""
        apply_prepared(hidden, residual, self)

    def forget(self) -> None:
        """Nothing: what was read at other sites is theirs to forget."""


def _by_kind(edits: SiteEdits, encoders: Sequence[TopKEncoder], *columns: IntArray) -> list[IntArray]:
    """Where the edits are of one token norm, one group of one encoder, and equal in the given columns."""
    group = np.zeros(len(edits), dtype=np.int64)
    for number in np.unique(edits.encoder[edits.encoder >= 0]):
        through = edits.encoder == number
        group[through] = edits.feature[through] // encoders[number].group_size
    kinds = np.stack([*columns, edits.norm, edits.encoder, group], axis=1)
    _, kind = np.unique(kinds, axis=0, return_inverse=True)
    return [np.flatnonzero(kind.ravel() == i) for i in range(int(kind.max()) + 1)]


def _split(edits: SiteEdits, mask: npt.NDArray[np.bool_]) -> tuple[SiteEdits | None, SiteEdits | None]:
    """(rows where the mask holds, the others), None for none: most tables have one kind of row, which is not copied."""
    if bool(mask.all()):
        return edits, None
    return (edits.take(mask), edits.take(~mask)) if bool(mask.any()) else (None, edits)


def _groups(edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder]) -> _Groups:
    if bool(edits.norm.any()):
        # Rows that are scaled depend on the stream though they read no feature: to the torch path, one never on.
        scaled = (edits.read < 0) & (edits.norm != TokenNorm.NONE)
        edits = replace(
            edits,
            read=np.where(scaled, edits.write, edits.read),
            threshold=np.where(scaled, np.float32(np.inf), edits.threshold),
        )
    long, short = _split(edits, edits.stop - edits.start >= MIN_SPAN)
    members, others = _split(short, short.encoder >= 0) if short is not None else (None, None)
    constants = reads = None
    if others is not None:
        pairs = one_row_a_token(others)
        constants, reads = _split(pairs, pairs.read < 0)
    read_pairs: tuple[ReadPairs, ...] = ()
    if reads is not None:
        norms = np.unique(reads.norm)
        parts = [reads] if len(norms) == 1 else [reads.take(reads.norm == norm) for norm in norms]
        read_pairs = tuple(ReadPairs.of(part, rows) for part in parts)
    member_pairs: tuple[MemberPairs, ...] = ()
    if members is not None:
        members = one_row_a_token(members)
        member_pairs = tuple(MemberPairs.of(members.take(kind), rows, encoders) for kind in _by_kind(members, encoders))
    spans: tuple[Span, ...] = ()
    if long is not None:
        spans = tuple(
            Span.of(long.take(kind), rows, encoders) for kind in _by_kind(long, encoders, long.start, long.stop)
        )
    return _Groups(
        constants=None if constants is None else ConstantPairs.of(constants, rows),
        reads=read_pairs,
        members=member_pairs,
        spans=spans,
    )


_NOTHING = _Groups(constants=None, reads=(), members=(), spans=())


def compile_for_cpu(ranks: bool) -> None:
    """Compile now what edits on a CPU run, which takes a second or two, and not while the first of them wait.

    ranks: of features too.
    """
    import_module("steer_kernels.apply_edits.cpu_kernel")
    if ranks:
        import_module("steer_kernels.cpu_ranks")


def is_compiled(edits: SiteEdits, rows: torch.Tensor) -> bool:
    """Whether the compiled kernel has what `edits` need. Nothing depends on how many there are, so that a token's
    numbers do not depend on who else is in the batch. (Matrix products by two threads are faster from about 128 tokens
    with eight edits on: at d_model 2304 they took 118 us, the kernel 142.)"""
    float32_here = rows.device.type == "cpu" and rows.dtype == torch.float32
    local = (edits.source < 0).all() and (edits.encoder < 0).all() and (edits.norm == TokenNorm.NONE).all()
    return bool(float32_here and local)


def prepare_edits(edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder] = ()) -> PreparedEdits:
    """Sort `edits` (at least one row, each on at least one token) into groups that hold their part of the bank.

    rows: [capacity, d_model], the row bank; what the edits use of it is copied. encoders: those that edits number.
    """
    first_token, last_token = int(edits.start.min()), int(edits.stop.max())
    if is_compiled(edits, rows):
        # It is compiled when it is imported: not on machines that have no use for it.
        from steer_kernels.apply_edits.cpu_kernel import TokenEdits

        compiled = TokenEdits.of(edits, rows)
        return PreparedEdits(_NOTHING, (), None, first_token, last_token, compiled)
    away: SiteEdits | None = None
    local: SiteEdits | None = edits
    if int(edits.source.max()) >= 0:
        # A row that neither reads nor is scaled depends on no stream, wherever it would be read.
        elsewhere = (edits.source >= 0) & ((edits.read >= 0) | (edits.norm != TokenNorm.NONE))
        away, local = _split(edits, elsewhere)
    norm_tokens = None
    if bool(edits.preserve_norm.any()):
        kept = one_row_a_token(edits.take(edits.preserve_norm))
        norm_tokens = Tokens(np.unique(kept.start), rows.device)
    remote: tuple[RemoteReads, ...] = ()
    if away is not None:
        remote = tuple(
            RemoteReads(int(source), _groups(away.take(away.source == source), rows, encoders))
            for source in np.unique(away.source)
        )
    return PreparedEdits(
        local=_NOTHING if local is None else _groups(local, rows, encoders),
        remote=remote,
        norm_tokens=norm_tokens,
        first_token=first_token,
        last_token=last_token,
    )


def read_activations(
    stream: torch.Tensor, edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder] = ()
) -> torch.Tensor:
    """f [tokens, E] that `edits` would act by on each token of stream [tokens, d_model], float32.

    edits: E rows that read; where they start, stop and read from is not looked at.
    """
    f = torch.empty(len(stream), len(edits), device=stream.device)
    for kind in _by_kind(edits, encoders):
        reads = SpanReads.of(edits.take(kind), rows, encoders)
        x, _ = scaled(stream.float(), reads.norm)
        f[:, torch.from_numpy(kind).to(stream.device)] = reads.activations(x)
    return f


def apply_prepared(hidden: torch.Tensor, residual: torch.Tensor | None, edits: PreparedEdits) -> None:
    """Edit `hidden` in place so that hidden + residual becomes the edited residual stream.

    hidden, residual: [tokens, d_model] (residual None: hidden is the stream). What the edits read elsewhere must have
    been read: `edits.remote` are ready.
    Reads, activations and sums are float32; `hidden` is written once, in its own dtype.
    """
    if edits.compiled is not None:
        edits.compiled.apply(hidden, residual)
        return
    # All reads come before any write: several rows may act on one token.
    coefficients = edits.local.coefficients(hidden, residual)
    norm_before = None
    if edits.norm_tokens is not None:
        norm_before = torch.linalg.vector_norm(edits.norm_tokens.stream(hidden, residual), dim=-1)

    exact = hidden.dtype == torch.float32
    total = hidden if exact else torch.zeros_like(hidden, dtype=torch.float32)
    edits.local.write(total, coefficients)
    for remote in edits.remote:
        remote.write(total)
    limit = stream_limit(hidden.dtype)
    touched = slice(edits.first_token, edits.last_token)
    if not exact:
        edited = total[touched] + hidden[touched].float()
        hidden[touched] = torch.where(total[touched] == 0, edited, edited.clamp(-limit, limit)).to(hidden.dtype)
    elif edits.reads_stream:
        hidden[touched].clamp_(-limit, limit)

    if edits.norm_tokens is not None and norm_before is not None:
        stream = edits.norm_tokens.stream(hidden, residual)
        norm = torch.linalg.vector_norm(stream, dim=-1)
        scaled = stream * torch.where(norm > 0, norm_before / norm, 1.0).unsqueeze(-1)
        if residual is not None:
            scaled.sub_(edits.norm_tokens.of(residual).float())
        edits.norm_tokens.assign(hidden, scaled.to(hidden.dtype))
