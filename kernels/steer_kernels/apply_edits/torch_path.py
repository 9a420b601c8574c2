"""The path in plain torch operations, fast on CPU.

Index tensors are prepared once per distinct step table and reused while it lasts, which is most of decoding. Edits of
one token become gathered rows (decode); edits of many tokens become small matrix products over a slice (prefill).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steer_kernels.apply_edits.edits import SiteEdits, TopKEncoder, stream_limit

# Below this a gathered row costs less than a matrix product per span.
MIN_SPAN = 8
# Bounds the [tokens, d_sae] pre-activations that a TopK membership test holds at once.
MEMBERSHIP_CHUNK = 256


@dataclass(frozen=True)
class _Response:
    """g(f) - f for P values; None where no row of the group needs the step."""

    threshold: torch.Tensor | None
    scale: torch.Tensor
    shift: torch.Tensor
    low: torch.Tensor | None
    high: torch.Tensor | None

    @staticmethod
    def of(edits: SiteEdits, device: torch.device) -> _Response:
        def column(values: np.ndarray, neutral: float) -> torch.Tensor | None:
            return None if np.all(values == neutral) else torch.from_numpy(values).to(device)

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
        return g - f


@dataclass(frozen=True)
class _ConstantPairs:
    """Rows that read nothing, each on one token: delta = constant * write."""

    token: torch.Tensor
    write: torch.Tensor
    constant: torch.Tensor


@dataclass(frozen=True)
class _ReadPairs:
    """Rows that read, each on one token."""

    token: torch.Tensor
    read: torch.Tensor
    write: torch.Tensor
    bias: torch.Tensor
    response: _Response


@dataclass(frozen=True)
class _MemberPairs:
    """Rows that read through one TopK encoder, each on one token."""

    pairs: _ReadPairs
    encoder: int
    feature: torch.Tensor
    tokens: torch.Tensor
    token_slot: torch.Tensor


@dataclass(frozen=True)
class _Span:
    """n rows on the same tokens [start, stop)."""

    start: int
    stop: int
    constant_write: torch.Tensor | None
    constant: torch.Tensor | None
    read: torch.Tensor | None
    write: torch.Tensor | None
    bias: torch.Tensor | None
    response: _Response | None


@dataclass(frozen=True)
class PreparedEdits:
    """SiteEdits sorted into the groups that the torch path runs."""

    constants: _ConstantPairs | None
    reads: _ReadPairs | None
    members: tuple[_MemberPairs, ...]
    spans: tuple[_Span, ...]
    norm_tokens: torch.Tensor | None
    first_token: int
    last_token: int


def _constant(edits: SiteEdits) -> np.ndarray:
    """g(0): what a row writes that reads nothing."""
    return np.minimum(np.maximum(edits.shift, edits.low), edits.high)


def _expand(edits: SiteEdits) -> SiteEdits:
    """The same edits with one row per (row, token)."""
    lengths = edits.stop - edits.start
    row = np.repeat(np.arange(len(edits)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    expanded = edits.take(row)
    expanded.start[:] += offset
    expanded.stop[:] = expanded.start + 1
    return expanded


def _read_pairs(edits: SiteEdits, device: torch.device) -> _ReadPairs:
    return _ReadPairs(
        token=torch.from_numpy(edits.start).to(device),
        read=torch.from_numpy(edits.read).to(device),
        write=torch.from_numpy(edits.write).to(device),
        bias=torch.from_numpy(edits.bias).to(device),
        response=_Response.of(edits, device),
    )


def _member_pairs(edits: SiteEdits, encoder: int, device: torch.device) -> _MemberPairs:
    tokens, slot = np.unique(edits.start, return_inverse=True)
    return _MemberPairs(
        pairs=_read_pairs(edits, device),
        encoder=encoder,
        feature=torch.from_numpy(edits.feature).to(device),
        tokens=torch.from_numpy(tokens).to(device),
        token_slot=torch.from_numpy(slot.astype(np.int64)).to(device),
    )


def _span(edits: SiteEdits, device: torch.device) -> _Span:
    reading = edits.read >= 0
    constants, reads = edits.take(~reading), edits.take(reading)
    has_constants, has_reads = len(constants) > 0, len(reads) > 0
    return _Span(
        start=int(edits.start[0]),
        stop=int(edits.stop[0]),
        constant_write=torch.from_numpy(constants.write).to(device) if has_constants else None,
        constant=torch.from_numpy(_constant(constants)).to(device) if has_constants else None,
        read=torch.from_numpy(reads.read).to(device) if has_reads else None,
        write=torch.from_numpy(reads.write).to(device) if has_reads else None,
        bias=torch.from_numpy(reads.bias).to(device) if has_reads else None,
        response=_Response.of(reads, device) if has_reads else None,
    )


def prepare_edits(edits: SiteEdits, device: torch.device) -> PreparedEdits:
    """Sort `edits` (at least one row, none of them empty) into groups with their index tensors on `device`."""
    member = edits.encoder >= 0
    long = (edits.stop - edits.start >= MIN_SPAN) & ~member
    single = _expand(edits.take(~long & ~member))
    constants, reads = single.take(single.read < 0), single.take(single.read >= 0)
    members = _expand(edits.take(member))
    long_edits = edits.take(long)
    bounds = np.stack([long_edits.start, long_edits.stop], axis=1)
    norm_edits = _expand(edits.take(edits.preserve_norm))
    return PreparedEdits(
        constants=_ConstantPairs(
            token=torch.from_numpy(constants.start).to(device),
            write=torch.from_numpy(constants.write).to(device),
            constant=torch.from_numpy(_constant(constants)).to(device),
        )
        if len(constants)
        else None,
        reads=_read_pairs(reads, device) if len(reads) else None,
        members=tuple(
            _member_pairs(members.take(members.encoder == encoder), int(encoder), device)
            for encoder in np.unique(members.encoder)
        ),
        spans=tuple(_span(long_edits.take((bounds == span).all(axis=1)), device) for span in np.unique(bounds, axis=0)),
        norm_tokens=torch.from_numpy(np.unique(norm_edits.start)).to(device) if len(norm_edits) else None,
        first_token=int(edits.start.min()),
        last_token=int(edits.stop.max()),
    )


def _stream(hidden: torch.Tensor, residual: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    gathered = hidden.index_select(0, tokens).float()
    return gathered if residual is None else gathered.add_(residual.index_select(0, tokens).float())


def _pre_acts(x: torch.Tensor, pairs: _ReadPairs, rows: torch.Tensor) -> torch.Tensor:
    return (x * rows.index_select(0, pairs.read).float()).sum(-1) + pairs.bias


def _member_activation(x: torch.Tensor, group: _MemberPairs, rows: torch.Tensor, encoder: TopKEncoder) -> torch.Tensor:
    """TopK activations [P] of the group's features; x [U, d_model] is the stream of its distinct tokens."""
    f = torch.zeros_like(group.pairs.bias)
    # A feature with a pre-activation of zero or less is off whatever the others are: most need no full encode.
    undecided = (_pre_acts(x.index_select(0, group.token_slot), group.pairs, rows) > 0).nonzero().squeeze(-1)
    for chunk in undecided.split(MEMBERSHIP_CHUNK):
        slots, inverse = torch.unique(group.token_slot[chunk], return_inverse=True)
        all_pre = torch.addmm(encoder.b_enc, x.index_select(0, slots), encoder.W_enc).index_select(0, inverse)
        feature = group.feature[chunk].unsqueeze(-1)
        pre = all_pre.gather(1, feature)
        ahead = (all_pre > pre).sum(-1)
        index = torch.arange(all_pre.shape[1], device=x.device)
        ahead += ((all_pre == pre) & (index < feature)).sum(-1)
        f[chunk] = torch.where(ahead < encoder.k, pre.squeeze(-1).relu(), 0.0)
    return f


def apply_prepared(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    edits: PreparedEdits,
    encoders: Sequence[TopKEncoder] = (),
) -> None:
    """Edit `hidden` in place so that hidden + residual becomes the edited residual stream.

    hidden, residual: [tokens, d_model] (residual None: hidden is the stream). rows: [capacity, d_model].
    Reads, activations and sums are float32; `hidden` is written once, in its own dtype.
    """
    # All reads come before any write: several rows may act on one token.
    pair_deltas: list[tuple[torch.Tensor, torch.Tensor]] = []
    if edits.constants is not None:
        write = rows.index_select(0, edits.constants.write).float()
        pair_deltas.append((edits.constants.token, write.mul_(edits.constants.constant.unsqueeze(-1))))
    if edits.reads is not None:
        pairs = edits.reads
        pre = _pre_acts(_stream(hidden, residual, pairs.token), pairs, rows)
        coefficient = pairs.response.coefficient(pairs.response.activation(pre))
        pair_deltas.append((pairs.token, rows.index_select(0, pairs.write).float().mul_(coefficient.unsqueeze(-1))))
    for group in edits.members:
        f = _member_activation(_stream(hidden, residual, group.tokens), group, rows, encoders[group.encoder])
        coefficient = group.pairs.response.coefficient(f)
        write = rows.index_select(0, group.pairs.write).float()
        pair_deltas.append((group.pairs.token, write.mul_(coefficient.unsqueeze(-1))))
    span_coefficients: list[torch.Tensor | None] = []
    for span in edits.spans:
        if span.read is None or span.bias is None or span.response is None:
            span_coefficients.append(None)
            continue
        x = hidden[span.start : span.stop].float()
        if residual is not None:
            x = x + residual[span.start : span.stop].float()
        pre = torch.addmm(span.bias, x, rows.index_select(0, span.read).float().T)
        span_coefficients.append(span.response.coefficient(span.response.activation(pre)))
    norm_before = None
    if edits.norm_tokens is not None:
        norm_before = torch.linalg.vector_norm(_stream(hidden, residual, edits.norm_tokens), dim=-1)

    exact = hidden.dtype == torch.float32
    first = 0 if exact else edits.first_token
    touched = hidden[first : edits.last_token]
    total = touched if exact else torch.zeros_like(touched, dtype=torch.float32)
    for tokens, delta in pair_deltas:
        total.index_add_(0, tokens if first == 0 else tokens - first, delta)
    for span, coefficient_or_none in zip(edits.spans, span_coefficients, strict=True):
        target = total[span.start - first : span.stop - first]
        if coefficient_or_none is not None and span.write is not None:
            target.addmm_(coefficient_or_none, rows.index_select(0, span.write).float())
        if span.constant is not None and span.constant_write is not None:
            target.add_(span.constant @ rows.index_select(0, span.constant_write).float())
    limit = stream_limit(hidden.dtype)
    if exact:
        touched.clamp_(-limit, limit)
    else:
        edited = total + touched.float()
        touched.copy_(torch.where(total == 0, edited, edited.clamp_(-limit, limit)))

    if edits.norm_tokens is not None and norm_before is not None:
        stream = _stream(hidden, residual, edits.norm_tokens)
        norm = torch.linalg.vector_norm(stream, dim=-1)
        stream.mul_(torch.where(norm > 0, norm_before / norm, 1.0).unsqueeze(-1))
        if residual is not None:
            stream.sub_(residual.index_select(0, edits.norm_tokens).float())
        hidden.index_copy_(0, edits.norm_tokens, stream.to(hidden.dtype))
