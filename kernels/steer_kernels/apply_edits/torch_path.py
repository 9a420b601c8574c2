"""The path in plain torch operations, fast on CPU.

What does not depend on the stream is computed when a step table is prepared and reused while the table lasts, which is
most of decoding. Edits of one token become rows beside each other (decode); edits of many tokens become small matrix
products over a slice (prefill).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from steer_kernels.apply_edits.edits import FloatArray, IntArray, SiteEdits, TopKEncoder, stream_limit

# Below this, rows beside each other cost less than a matrix product per span.
MIN_SPAN = 8
# Bounds the [tokens, d_sae] pre-activations that a TopK membership test holds at once.
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
        )

    def activation(self, pre: torch.Tensor) -> torch.Tensor:
        return pre if self.threshold is None else torch.where(pre > self.threshold, pre, 0.0)

    def coefficient(self, f: torch.Tensor) -> torch.Tensor:
        g = torch.addcmul(self.shift, f, self.scale)
        if self.low is not None:
            g = torch.maximum(g, self.low)
        if self.high is not None:
            g = torch.minimum(g, self.high)
        return g.sub_(f)


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

    def pre_acts(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.read).sum(-1) + self.bias


@dataclass(frozen=True)
class _MemberPairs:
    """Rows that read through one TopK encoder, each on one token. slot: the token's place among the distinct ones."""

    pairs: _ReadPairs
    encoder: int
    feature: torch.Tensor
    distinct: _Tokens
    slot: torch.Tensor


@dataclass(frozen=True)
class _Span:
    """Rows on the same tokens [start, stop), through the same encoder or none.

    constant [d_model]: what those that read nothing add, together.
    """

    start: int
    stop: int
    constant: torch.Tensor | None
    reads: _SpanReads | None


@dataclass(frozen=True)
class _SpanReads:
    """n rows that read. read, write: [n, d_model] float32. encoder, feature [n]: what TopK they read through, or -1."""

    read: torch.Tensor
    write: torch.Tensor
    bias: torch.Tensor
    response: _Response
    encoder: int
    feature: torch.Tensor

    @staticmethod
    def of(edits: SiteEdits, rows: torch.Tensor) -> _SpanReads:
        return _SpanReads(
            read=_gather(rows, edits.read),
            write=_gather(rows, edits.write),
            bias=torch.from_numpy(edits.bias).to(rows.device),
            response=_Response.of(edits, rows.device),
            encoder=int(edits.encoder[0]),
            feature=torch.from_numpy(edits.feature).to(rows.device),
        )

    def activations(self, x: torch.Tensor, encoders: Sequence[TopKEncoder]) -> torch.Tensor:
        """f [tokens, n] of x [tokens, d_model], float32."""
        pre = torch.addmm(self.bias, x, self.read.T)
        if self.encoder < 0:
            return self.response.activation(pre)
        encoder = encoders[self.encoder]
        f = torch.zeros_like(pre)
        # As for pairs: tokens on which no row can be on need no full encode.
        undecided = (pre > 0).any(-1).nonzero().squeeze(-1)
        for chunk in undecided.split(MEMBERSHIP_CHUNK):
            all_pre = torch.addmm(encoder.b_enc, x.index_select(0, chunk), encoder.W_enc)
            f[chunk] = _topk(all_pre, encoder.k).index_select(1, self.feature)
        return f


@dataclass(frozen=True)
class PreparedEdits:
    """SiteEdits sorted into the groups that the torch path runs."""

    constants: _ConstantPairs | None
    reads: _ReadPairs | None
    members: tuple[_MemberPairs, ...]
    spans: tuple[_Span, ...]
    norm_tokens: _Tokens | None
    first_token: int
    last_token: int

    @property
    def reads_stream(self) -> bool:
        """Whether any edit depends on the stream, so that edits can compound from layer to layer."""
        return self.reads is not None or bool(self.members) or any(span.reads is not None for span in self.spans)


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
    )


def _member_pairs(edits: SiteEdits, encoder: int, rows: torch.Tensor) -> _MemberPairs:
    tokens, slot = np.unique(edits.start, return_inverse=True)
    return _MemberPairs(
        pairs=_read_pairs(edits, rows),
        encoder=encoder,
        feature=torch.from_numpy(edits.feature).to(rows.device),
        distinct=_Tokens(tokens, rows.device),
        slot=torch.from_numpy(slot.astype(np.int64)).to(rows.device),
    )


def _span(edits: SiteEdits, rows: torch.Tensor) -> _Span:
    reading = edits.read >= 0
    constants, reads = edits.take(~reading), edits.take(reading)
    constant = None
    if len(constants):
        constant = torch.from_numpy(_constant(constants)).to(rows.device) @ _gather(rows, constants.write)
    return _Span(
        start=int(edits.start[0]),
        stop=int(edits.stop[0]),
        constant=constant,
        reads=_SpanReads.of(reads, rows) if len(reads) else None,
    )


def _spans(edits: SiteEdits, rows: torch.Tensor) -> tuple[_Span, ...]:
    kinds = np.stack([edits.start, edits.stop, edits.encoder], axis=1)
    return tuple(_span(edits.take((kinds == kind).all(axis=1)), rows) for kind in np.unique(kinds, axis=0))


def _members(edits: SiteEdits, rows: torch.Tensor) -> tuple[_MemberPairs, ...]:
    pairs = _one_row_a_token(edits)
    return tuple(
        _member_pairs(pairs.take(pairs.encoder == encoder), int(encoder), rows) for encoder in np.unique(pairs.encoder)
    )


def _split(edits: SiteEdits, mask: npt.NDArray[np.bool_]) -> tuple[SiteEdits | None, SiteEdits | None]:
    """(rows where the mask holds, the others), None for none: most tables have one kind of row, which is not copied."""
    if bool(mask.all()):
        return edits, None
    return (edits.take(mask), edits.take(~mask)) if bool(mask.any()) else (None, edits)


def prepare_edits(edits: SiteEdits, rows: torch.Tensor) -> PreparedEdits:
    """Sort `edits` (at least one row, each on at least one token) into groups that hold their part of the bank.

    rows: [capacity, d_model], the row bank; what the edits use of it is copied.
    """
    long, short = _split(edits, edits.stop - edits.start >= MIN_SPAN)
    members, others = _split(short, short.encoder >= 0) if short is not None else (None, None)
    constants = reads = None
    if others is not None:
        pairs = _one_row_a_token(others)
        constants, reads = _split(pairs, pairs.read < 0)
    norm_tokens = None
    if bool(edits.preserve_norm.any()):
        kept = _one_row_a_token(edits.take(edits.preserve_norm))
        norm_tokens = _Tokens(np.unique(kept.start), rows.device)
    return PreparedEdits(
        constants=None if constants is None else _constant_pairs(constants, rows),
        reads=None if reads is None else _read_pairs(reads, rows),
        members=() if members is None else _members(members, rows),
        spans=() if long is None else _spans(long, rows),
        norm_tokens=norm_tokens,
        first_token=int(edits.start.min()),
        last_token=int(edits.stop.max()),
    )


def _member_activation(x: torch.Tensor, group: _MemberPairs, encoder: TopKEncoder) -> torch.Tensor:
    """TopK activations [P] of the group's features; x [distinct tokens, d_model] is their stream."""
    f = torch.zeros_like(group.pairs.bias)
    # A feature with a pre-activation of zero or less is off whatever the others are: most need no full encode.
    undecided = (group.pairs.pre_acts(x.index_select(0, group.slot)) > 0).nonzero().squeeze(-1)
    for chunk in undecided.split(MEMBERSHIP_CHUNK):
        slots, inverse = torch.unique(group.slot[chunk], return_inverse=True)
        all_pre = torch.addmm(encoder.b_enc, x.index_select(0, slots), encoder.W_enc).index_select(0, inverse)
        feature = group.feature[chunk].unsqueeze(-1)
        pre = all_pre.gather(1, feature)
        ahead = (all_pre > pre).sum(-1)
        index = torch.arange(all_pre.shape[1], device=x.device)
        ahead += ((all_pre == pre) & (index < feature)).sum(-1)
        f[chunk] = torch.where(ahead < encoder.k, pre.squeeze(-1).relu(), 0.0)
    return f


def _topk(pre_acts: torch.Tensor, k: int) -> torch.Tensor:
    """TopK activations of whole rows of pre_acts [tokens, d_sae]; equal values go to the lower index."""
    smallest = pre_acts.topk(k, dim=-1).values[:, -1:]
    above, tied = pre_acts > smallest, pre_acts == smallest
    room = k - above.sum(-1, keepdim=True)
    return torch.where(above | (tied & (tied.cumsum(-1) <= room)), pre_acts.relu(), 0.0)


def read_activations(
    stream: torch.Tensor, edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder] = ()
) -> torch.Tensor:
    """f [tokens, E] that `edits` would act by on each token of stream [tokens, d_model], float32.

    edits: E rows that read, all through the same encoder or none; where they start and stop is not looked at.
    """
    return _SpanReads.of(edits, rows).activations(stream.float(), encoders)


def apply_prepared(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    edits: PreparedEdits,
    encoders: Sequence[TopKEncoder] = (),
) -> None:
    """Edit `hidden` in place so that hidden + residual becomes the edited residual stream.

    hidden, residual: [tokens, d_model] (residual None: hidden is the stream).
    Reads, activations and sums are float32; `hidden` is written once, in its own dtype.
    """
    # All reads come before any write: several rows may act on one token.
    deltas: list[tuple[_Tokens, torch.Tensor]] = []
    if edits.constants is not None:
        deltas.append((edits.constants.tokens, edits.constants.delta))
    if edits.reads is not None:
        pairs = edits.reads
        f = pairs.response.activation(pairs.pre_acts(pairs.tokens.stream(hidden, residual)))
        deltas.append((pairs.tokens, pairs.write * pairs.response.coefficient(f).unsqueeze(-1)))
    for group in edits.members:
        f = _member_activation(group.distinct.stream(hidden, residual), group, encoders[group.encoder])
        pairs = group.pairs
        deltas.append((pairs.tokens, pairs.write * pairs.response.coefficient(f).unsqueeze(-1)))
    products: list[tuple[_Span, _SpanReads, torch.Tensor]] = []
    for span in edits.spans:
        if span.reads is not None:
            x = hidden[span.start : span.stop].float()
            if residual is not None:
                x = x + residual[span.start : span.stop].float()
            f = span.reads.activations(x, encoders)
            products.append((span, span.reads, span.reads.response.coefficient(f)))
    norm_before = None
    if edits.norm_tokens is not None:
        norm_before = torch.linalg.vector_norm(edits.norm_tokens.stream(hidden, residual), dim=-1)

    exact = hidden.dtype == torch.float32
    total = hidden if exact else torch.zeros_like(hidden, dtype=torch.float32)
    for tokens, delta in deltas:
        tokens.add_to(total, delta)
    for span, reads, coefficient in products:
        total[span.start : span.stop].addmm_(coefficient, reads.write)
    for span in edits.spans:
        if span.constant is not None:
            total[span.start : span.stop].add_(span.constant)
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
