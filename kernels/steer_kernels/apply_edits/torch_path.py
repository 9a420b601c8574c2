"""The path in plain torch operations, fast on CPU.

What does not depend on the stream is computed when a step table is prepared and reused while the table lasts, which is
most of decoding. Edits of one token become rows beside each other (decode); edits of many tokens become small matrix
products over a slice (prefill). What differs by kind of row (the encoder, the token norm) is decided when the table is
prepared: rows of one kind are one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from steer_kernels.apply_edits.edits import (
    FloatArray,
    IntArray,
    SiteEdits,
    TokenNorm,
    TopKEncoder,
    group_probability,
    stream_limit,
)
from steer_kernels.apply_edits.token_norm import scaled

# Below this, rows beside each other cost less than a matrix product per span.
MIN_SPAN = 8
# Bounds the [tokens, features] pre-activations that a membership test holds at once.
MEMBERSHIP_CHUNK = 256


class _Tokens:
    """Some tokens of the batch: a slice where they lie together, which costs no copy, else an index."""

    def __init__(self, tokens: IntArray, device: torch.device) -> None:
        first, last = int(tokens[0]), int(tokens[-1])
        self.index: torch.Tensor | slice
        if last - first == len(tokens) - 1 and bool((np.diff(tokens) == 1).all()):
            self.index = slice(first, last + 1)
        else:
            self.index = torch.from_numpy(tokens).to(device)

    def stream(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Their residual stream, float32."""
        part = self.of(hidden)
        if residual is None:
            return part.float()
        return torch.add(part.float(), self.of(residual).float())

    def add_to(self, total: torch.Tensor, delta: torch.Tensor) -> None:
        """Add delta [tokens, d_model] to their rows of `total`."""
        if isinstance(self.index, slice):
            total[self.index].add_(delta)
        else:
            total.index_add_(0, self.index, delta)

    def add_scaled(self, total: torch.Tensor, rows: torch.Tensor, coefficients: torch.Tensor) -> None:
        """Add coefficients [P] times rows [P, d_model] to their rows of `total`."""
        if isinstance(self.index, slice):
            total[self.index].addcmul_(rows, coefficients.unsqueeze(-1))
        else:
            total.index_add_(0, self.index, rows * coefficients.unsqueeze(-1))

    def assign(self, hidden: torch.Tensor, values: torch.Tensor) -> None:
        if isinstance(self.index, slice):
            hidden[self.index].copy_(values)
        else:
            hidden.index_copy_(0, self.index, values)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.index] if isinstance(self.index, slice) else tensor.index_select(0, self.index)


@dataclass(frozen=True)
class _Response:
    """g(f) - f for some values; None where no row of the group needs the step."""

    threshold: torch.Tensor | None
    scale: torch.Tensor
    shift: torch.Tensor
    low: torch.Tensor | None
    high: torch.Tensor | None
    zero: torch.Tensor
    """0, made once: torch.where makes a tensor of a number in each call."""

    @staticmethod
    def of(edits: SiteEdits, device: torch.device) -> _Response:
        def column(values: FloatArray, neutral: float) -> torch.Tensor | None:
            return None if bool((values == neutral).all()) else torch.from_numpy(values).to(device)

        return _Response(
            threshold=column(edits.threshold, -np.inf),
            scale=torch.from_numpy(edits.scale).to(device),
            shift=torch.from_numpy(edits.shift).to(device),
            low=column(edits.low, -np.inf),
            high=column(edits.high, np.inf),
            zero=torch.zeros((), device=device),
        )

    def activation(self, pre: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """f of pre-activations; index: those rows of the group that they are of, None for all."""
        if self.threshold is None:
            return pre
        threshold = self.threshold if index is None else self.threshold[index]
        return torch.where(pre > threshold, pre, self.zero)

    def may_be_on(self, pre: torch.Tensor) -> torch.Tensor:
        """Where f is not zero, whatever the other features are."""
        return torch.ones_like(pre, dtype=torch.bool) if self.threshold is None else pre > self.threshold

    def coefficient(self, f: torch.Tensor) -> torch.Tensor:
        g = torch.addcmul(self.shift, f, self.scale)
        if self.low is not None:
            g = torch.maximum(g, self.low)
        if self.high is not None:
            g = torch.minimum(g, self.high)
        return g.sub_(f)


@dataclass(frozen=True)
class _Selector:
    """What decides which features of one group of an encoder survive.

    W_enc: [d_model, group size], b_enc: [group size]. feature [n]: places in the group of the features that are asked
    for. group: its number.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    k: int
    absolute: bool
    router: tuple[torch.Tensor, torch.Tensor] | None
    group: int
    feature: torch.Tensor

    @staticmethod
    def of(encoder: TopKEncoder, features: IntArray) -> _Selector:
        """features: of one group."""
        size = encoder.group_size
        group = int(features[0]) // size
        columns = slice(group * size, (group + 1) * size)
        return _Selector(
            W_enc=encoder.W_enc[:, columns],
            b_enc=encoder.b_enc[columns],
            k=encoder.k,
            absolute=encoder.absolute,
            router=encoder.router,
            group=group,
            feature=torch.from_numpy(features - group * size).to(encoder.b_enc.device),
        )

    def pre_acts(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b_enc, x, self.W_enc)

    def probability(self, x: torch.Tensor) -> torch.Tensor | None:
        """[tokens]: that of the group, 0 where the router chooses another; None without a router."""
        return None if self.router is None else group_probability(x, self.router, self.group)


@dataclass(frozen=True)
class _ConstantPairs:
    """Rows that read nothing, each on one token. delta [P, d_model]: what they add."""

    tokens: _Tokens
    delta: torch.Tensor


@dataclass(frozen=True)
class _ReadPairs:
    """P rows that read, each on one token. read, write: [P, d_model] float32."""

    tokens: _Tokens
    read: torch.Tensor
    write: torch.Tensor
    bias: torch.Tensor
    response: _Response
    norm: TokenNorm

    def pre_acts(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.read).sum(-1) + self.bias

    def coefficient(self, f: torch.Tensor, s: torch.Tensor | None) -> torch.Tensor:
        """What `write` is multiplied by, [P]."""
        coefficient = self.response.coefficient(f)
        return coefficient if s is None else coefficient.mul_(s)


@dataclass(frozen=True)
class _MemberPairs:
    """Rows that read through one group of an encoder, each on one token. slot: its place among the distinct ones."""

    pairs: _ReadPairs
    selector: _Selector
    distinct: _Tokens
    slot: torch.Tensor


@dataclass(frozen=True)
class _Span:
    """Rows on the same tokens [start, stop), of one kind.

    constant [d_model]: what those that read nothing add, together.
    """

    start: int
    stop: int
    constant: torch.Tensor | None
    reads: _SpanReads | None

    def stream(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """That of its tokens, float32."""
        x = hidden[self.start : self.stop].float()
        return x if residual is None else x + residual[self.start : self.stop].float()


@dataclass(frozen=True)
class _SpanReads:
    """n rows that read. read, write: [n, d_model] float32. selector: what decides whether their features survive."""

    read: torch.Tensor
    write: torch.Tensor
    bias: torch.Tensor
    response: _Response
    norm: TokenNorm
    selector: _Selector | None

    @staticmethod
    def of(edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder]) -> _SpanReads:
        encoder = int(edits.encoder[0])
        return _SpanReads(
            read=_gather(rows, edits.read),
            write=_gather(rows, edits.write),
            bias=torch.from_numpy(edits.bias).to(rows.device),
            response=_Response.of(edits, rows.device),
            norm=TokenNorm(int(edits.norm[0])),
            selector=None if encoder < 0 else _Selector.of(encoders[encoder], edits.feature),
        )

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """f [tokens, n] of x [tokens, d_model], float32, scaled by the token norm."""
        pre = torch.addmm(self.bias, x, self.read.T)
        if self.selector is None:
            return self.response.activation(pre)
        f = torch.zeros_like(pre)
        # As for pairs: tokens on which no row can be on need no encode.
        undecided = self.response.may_be_on(pre).any(-1)
        probability = self.selector.probability(x)
        if probability is not None:
            undecided &= probability > 0
        for chunk in undecided.nonzero().squeeze(-1).split(MEMBERSHIP_CHUNK):
            kept = _topk(self.selector.pre_acts(x.index_select(0, chunk)), self.selector.k, self.selector.absolute)
            f[chunk] = self.response.activation(kept.index_select(1, self.selector.feature))
        return f if probability is None else f.mul_(probability.unsqueeze(-1))

    def coefficient(self, x: torch.Tensor) -> torch.Tensor:
        """What `write` is multiplied by, [tokens, n]; x [tokens, d_model] float32."""
        x, s = scaled(x, self.norm)
        coefficient = self.response.coefficient(self.activations(x))
        return coefficient if s is None else coefficient.mul_(s.unsqueeze(-1))


@dataclass(frozen=True)
class _Groups:
    """Edits that read one stream, sorted into what the torch path runs."""

    constants: _ConstantPairs | None
    reads: tuple[_ReadPairs, ...]
    members: tuple[_MemberPairs, ...]
    spans: tuple[_Span, ...]

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
            f = _member_activation(x, group)
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
    """SiteEdits sorted into the groups that the torch path runs. remote: those that read another site."""

    local: _Groups
    remote: tuple[RemoteReads, ...]
    norm_tokens: _Tokens | None
    first_token: int
    last_token: int

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


def _constant(edits: SiteEdits) -> FloatArray:
    """g(0): what a row writes that reads nothing."""
    return np.minimum(np.maximum(edits.shift, edits.low), edits.high)


def _one_row_a_token(edits: SiteEdits) -> SiteEdits:
    """The same edits with one row per (row, token)."""
    lengths = edits.stop - edits.start
    if bool((lengths == 1).all()):
        return edits
    row = np.repeat(np.arange(len(edits)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    expanded = edits.take(row)
    expanded.start[:] += offset
    expanded.stop[:] = expanded.start + 1
    return expanded


def _gather(rows: torch.Tensor, index: IntArray) -> torch.Tensor:
    """Bank rows as float32, never a view: the bank may change hands before the table does."""
    return rows.index_select(0, torch.from_numpy(index).to(rows.device)).float()


def _constant_pairs(edits: SiteEdits, rows: torch.Tensor) -> _ConstantPairs:
    constant = torch.from_numpy(_constant(edits)).to(rows.device)
    return _ConstantPairs(_Tokens(edits.start, rows.device), _gather(rows, edits.write).mul_(constant.unsqueeze(-1)))


def _read_pairs(edits: SiteEdits, rows: torch.Tensor) -> _ReadPairs:
    return _ReadPairs(
        tokens=_Tokens(edits.start, rows.device),
        read=_gather(rows, edits.read),
        write=_gather(rows, edits.write),
        bias=torch.from_numpy(edits.bias).to(rows.device),
        response=_Response.of(edits, rows.device),
        norm=TokenNorm(int(edits.norm[0])),
    )


def _member_pairs(edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder]) -> _MemberPairs:
    tokens, slot = np.unique(edits.start, return_inverse=True)
    return _MemberPairs(
        pairs=_read_pairs(edits, rows),
        selector=_Selector.of(encoders[int(edits.encoder[0])], edits.feature),
        distinct=_Tokens(tokens, rows.device),
        slot=torch.from_numpy(slot.astype(np.int64)).to(rows.device),
    )


def _span(edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder]) -> _Span:
    reading = edits.read >= 0
    constants, reads = edits.take(~reading), edits.take(reading)
    constant = None
    if len(constants):
        constant = torch.from_numpy(_constant(constants)).to(rows.device) @ _gather(rows, constants.write)
    return _Span(
        start=int(edits.start[0]),
        stop=int(edits.stop[0]),
        constant=constant,
        reads=_SpanReads.of(reads, rows, encoders) if len(reads) else None,
    )


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
        pairs = _one_row_a_token(others)
        constants, reads = _split(pairs, pairs.read < 0)
    read_pairs: tuple[_ReadPairs, ...] = ()
    if reads is not None:
        norms = np.unique(reads.norm)
        parts = [reads] if len(norms) == 1 else [reads.take(reads.norm == norm) for norm in norms]
        read_pairs = tuple(_read_pairs(part, rows) for part in parts)
    member_pairs: tuple[_MemberPairs, ...] = ()
    if members is not None:
        members = _one_row_a_token(members)
        member_pairs = tuple(_member_pairs(members.take(kind), rows, encoders) for kind in _by_kind(members, encoders))
    spans: tuple[_Span, ...] = ()
    if long is not None:
        spans = tuple(
            _span(long.take(kind), rows, encoders) for kind in _by_kind(long, encoders, long.start, long.stop)
        )
    return _Groups(
        constants=None if constants is None else _constant_pairs(constants, rows),
        reads=read_pairs,
        members=member_pairs,
        spans=spans,
    )


_NOTHING = _Groups(constants=None, reads=(), members=(), spans=())


def prepare_edits(edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder] = ()) -> PreparedEdits:
    """Sort `edits` (at least one row, each on at least one token) into groups that hold their part of the bank.

    rows: [capacity, d_model], the row bank; what the edits use of it is copied. encoders: those that edits number.
    """
    away: SiteEdits | None = None
    local: SiteEdits | None = edits
    if int(edits.source.max()) >= 0:
        # A row that neither reads nor is scaled depends on no stream, wherever it would be read.
        elsewhere = (edits.source >= 0) & ((edits.read >= 0) | (edits.norm != TokenNorm.NONE))
        away, local = _split(edits, elsewhere)
    norm_tokens = None
    if bool(edits.preserve_norm.any()):
        kept = _one_row_a_token(edits.take(edits.preserve_norm))
        norm_tokens = _Tokens(np.unique(kept.start), rows.device)
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
        first_token=int(edits.start.min()),
        last_token=int(edits.stop.max()),
    )


def _member_activation(x: torch.Tensor, group: _MemberPairs) -> torch.Tensor:
    """Activations [P] of the group's features; x [distinct tokens, d_model] is their stream, scaled."""
    pairs, selector = group.pairs, group.selector
    f = torch.zeros_like(pairs.bias)
    # A feature at or below its threshold is off whatever the others are: most need no encode.
    undecided = pairs.response.may_be_on(pairs.pre_acts(x.index_select(0, group.slot)))
    probability = selector.probability(x)
    if probability is not None:
        probability = probability.index_select(0, group.slot)
        undecided &= probability > 0
    for chunk in undecided.nonzero().squeeze(-1).split(MEMBERSHIP_CHUNK):
        slots, inverse = torch.unique(group.slot[chunk], return_inverse=True)
        all_pre = selector.pre_acts(x.index_select(0, slots)).index_select(0, inverse)
        feature = selector.feature[chunk].unsqueeze(-1)
        pre = all_pre.gather(1, feature)
        scores, score = (all_pre.abs(), pre.abs()) if selector.absolute else (all_pre, pre)
        ahead = (scores > score).sum(-1)
        index = torch.arange(scores.shape[1], device=x.device)
        ahead += ((scores == score) & (index < feature)).sum(-1)
        f[chunk] = torch.where(ahead < selector.k, pairs.response.activation(pre.squeeze(-1), chunk), 0.0)
    return f if probability is None else f.mul_(probability)


def _topk(pre_acts: torch.Tensor, k: int, absolute: bool) -> torch.Tensor:
    """pre_acts [tokens, features] where they are among the k largest of their token, else 0; equal values go to the
    lower index. absolute: magnitudes are compared."""
    scores = pre_acts.abs() if absolute else pre_acts
    smallest = scores.topk(min(k, scores.shape[-1]), dim=-1).values[:, -1:]
    above, tied = scores > smallest, scores == smallest
    room = k - above.sum(-1, keepdim=True)
    return torch.where(above | (tied & (tied.cumsum(-1) <= room)), pre_acts, 0.0)


def read_activations(
    stream: torch.Tensor, edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder] = ()
) -> torch.Tensor:
    """f [tokens, E] that `edits` would act by on each token of stream [tokens, d_model], float32.

    edits: E rows that read; where they start, stop and read from is not looked at.
    """
    f = torch.empty(len(stream), len(edits), device=stream.device)
    for kind in _by_kind(edits, encoders):
        reads = _SpanReads.of(edits.take(kind), rows, encoders)
        x, _ = scaled(stream.float(), reads.norm)
        f[:, torch.from_numpy(kind).to(stream.device)] = reads.activations(x)
    return f


def apply_prepared(hidden: torch.Tensor, residual: torch.Tensor | None, edits: PreparedEdits) -> None:
    """Edit `hidden` in place so that hidden + residual becomes the edited residual stream.

    hidden, residual: [tokens, d_model] (residual None: hidden is the stream). What the edits read elsewhere must have
    been read: `edits.remote` are ready.
    Reads, activations and sums are float32; `hidden` is written once, in its own dtype.
    """
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
