"""The path in plain torch operations, fast on CPU.

What does not depend on the stream is computed when a step table is prepared and reused while the table lasts, which is
most of decoding. Edits of one token become rows beside each other (decode, `pairs`); edits of many tokens become small
matrix products over a slice (prefill, `spans`). What differs by kind of row (the encoder, the token norm) is decided
when the table is prepared: rows of one kind are one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch

from steer_kernels.apply_edits.batch_tokens import Tokens, one_row_a_token
from steer_kernels.apply_edits.closed import Closed, Places
from steer_kernels.apply_edits.edits import SiteEdits, TokenNorm, TopKEncoder, stream_limit
from steer_kernels.apply_edits.gates import GateReads, Gates
from steer_kernels.apply_edits.groups import NOTHING, Groups, by_kind, groups_of, split
from steer_kernels.apply_edits.spans import SpanReads
from steer_kernels.apply_edits.token_norm import scaled

if TYPE_CHECKING:
    from steer_kernels.apply_edits.cpu_kernel import TokenEdits


class RemoteReads:
    """What the edits of one site read at another, which runs earlier in the same forward.

    source: the site that is read.
    """

    def __init__(self, source: int, groups: Groups) -> None:
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
class KeptNorms:
    """Tokens whose streams keep their norms where one of the rows on them acts.

    slot [P]: of each pair of such a row and a token, the token's place among `tokens`. places: of the rows' gates; None
    where none has one.
    """

    tokens: Tokens
    slot: torch.Tensor
    places: Places | None

    @staticmethod
    def of(edits: SiteEdits, device: torch.device, closed: Closed | None) -> KeptNorms:
        pairs = one_row_a_token(edits)
        tokens, slot = np.unique(pairs.start, return_inverse=True)
        index = torch.from_numpy(slot.astype(np.int64)).to(device)
        return KeptNorms(Tokens(tokens, device), index, Places.of(closed, pairs.gate, pairs.start))

    def norms(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Those of their streams, [tokens]."""
        return torch.linalg.vector_norm(self.tokens.stream(hidden, residual), dim=-1)

    def restore(self, before: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Rescale their edited streams to the norms that they had before. Tokens on which all such rows' gates are
        closed stay as they are to the bit."""
        stream = self.tokens.stream(hidden, residual)
        norm = torch.linalg.vector_norm(stream, dim=-1)
        scaled = stream * torch.where(norm > 0, before / norm, 1.0).unsqueeze(-1)
        if residual is not None:
            scaled.sub_(self.tokens.of(residual).float())
        restored = scaled.to(hidden.dtype)
        if self.places is not None:
            acting = torch.zeros_like(norm).index_add_(0, self.slot, (~self.places.closed_ones()).float())
            restored = torch.where((acting > 0).unsqueeze(-1), restored, self.tokens.of(hidden))
        self.tokens.assign(hidden, restored)


@dataclass(frozen=True)
class PreparedEdits:
    """SiteEdits sorted into the groups that the torch path runs. remote: those that read another site. gates: what
    decides about them. compiled: all of them instead, where the compiled kernel has what they need."""

    local: Groups
    remote: tuple[RemoteReads, ...]
    gates: tuple[GateReads, ...]
    kept_norms: KeptNorms | None
    first_token: int
    last_token: int
    compiled: TokenEdits | None = None

    @property
    def reads_stream(self) -> bool:
        """Whether any edit depends on a stream, so that edits can compound from layer to layer."""
        return bool(self.remote) or self.local.reads_stream

    @property
    def ready(self) -> bool:
        """Whether everything that is read apart was read in this forward."""
        return all(reads.ready for reads in self.remote) and all(reads.ready for reads in self.gates)

    def apply(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """`apply_prepared` of these edits."""
        apply_prepared(hidden, residual, self)

    def forget(self) -> None:
        """Nothing: what was read at other sites is theirs to forget."""


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


def prepare_edits(
    edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder] = (), gates: Gates | None = None
) -> PreparedEdits:
    """Sort `edits` (at least one row, each on at least one token) into groups that hold their part of the bank.

    rows: [capacity, d_model], the row bank; what the edits use of it is copied. encoders: those that edits number.
    gates: of the forward, where edits go through any.
    """
    first_token, last_token = int(edits.start.min()), int(edits.stop.max())
    waits_for = () if gates is None else gates.reads_for(edits.gate.tolist())
    closed = gates.closed if gates is not None and waits_for else None
    if is_compiled(edits, rows):
        # It is compiled when it is imported: not on machines that have no use for it.
        from steer_kernels.apply_edits.cpu_kernel import TokenEdits

        compiled = TokenEdits.of(edits, rows, closed)
        return PreparedEdits(NOTHING, (), waits_for, None, first_token, last_token, compiled)
    away: SiteEdits | None = None
    local: SiteEdits | None = edits
    if int(edits.source.max()) >= 0:
        # A row that neither reads nor is scaled depends on no stream, wherever it would be read.
        elsewhere = (edits.source >= 0) & ((edits.read >= 0) | (edits.norm != TokenNorm.NONE))
        away, local = split(edits, elsewhere)
    kept_norms = None
    if bool(edits.preserve_norm.any()):
        kept_norms = KeptNorms.of(edits.take(edits.preserve_norm), rows.device, closed)
    remote: tuple[RemoteReads, ...] = ()
    if away is not None:
        remote = tuple(
            RemoteReads(int(source), groups_of(away.take(away.source == source), rows, encoders, closed))
            for source in np.unique(away.source)
        )
    return PreparedEdits(
        local=NOTHING if local is None else groups_of(local, rows, encoders, closed),
        remote=remote,
        gates=waits_for,
        kept_norms=kept_norms,
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
    for kind in by_kind(edits, encoders):
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
    norms_before = None if edits.kept_norms is None else edits.kept_norms.norms(hidden, residual)

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

    if edits.kept_norms is not None and norms_before is not None:
        edits.kept_norms.restore(norms_before, hidden, residual)
