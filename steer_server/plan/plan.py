"""What a request resolves to. Immutable, and small enough to travel with the request to every worker."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from typing import Literal

import msgspec

TokenNorm = Literal["none", "layer_norm", "constant_norm"]

UNBOUNDED = 1 << 62
"""End of a token interval that lasts as long as the sequence."""


class EncoderRow(msgspec.Struct, frozen=True, array_like=True, tag="encoder"):
    """The encoder row of `feature` of the SAE with this SHA-256, its bias and activation function with it."""

    sae: str
    feature: int


class DecoderRow(msgspec.Struct, frozen=True, array_like=True, tag="decoder"):
    """The decoder row of `feature` of the SAE with this SHA-256."""

    sae: str
    feature: int


class InlineRow(msgspec.Struct, frozen=True, array_like=True, tag="inline"):
    """A row that the request brought, by the SHA-256 of its float32 bytes."""

    sha256: str


RowRef = EncoderRow | DecoderRow | InlineRow
"""A row by its content: equal references are one row in the bank, whoever asked for it."""


class Response(msgspec.Struct, frozen=True, array_like=True):
    """g(f) = clamp(scale * f + shift, low, high)."""

    scale: float = 1.0
    shift: float = 0.0
    low: float = float("-inf")
    high: float = float("inf")


class Target(msgspec.Struct, frozen=True, array_like=True):
    """Which tokens of a sequence an edit acts on.

    `prompt` are the prompt's tokens, `generation` the generated ones. A token's state decides the token after it, so
    the first generated token is decided by the last prompt token and `generation` does not reach it.
    skip_first: tokens at the start of the sequence that are left alone.
    """

    phase: Literal["prompt", "generation", "all"] = "all"
    skip_first: int = 0

    def interval(self, prompt_len: int) -> tuple[int, int]:
        """Positions [first, end) in a sequence whose prompt has `prompt_len` tokens; empty where end <= first."""
        if self.phase == "prompt":
            return self.skip_first, prompt_len
        if self.phase == "generation":
            return max(self.skip_first, prompt_len), UNBOUNDED
        return self.skip_first, UNBOUNDED

    def may_meet(self, other: Target) -> bool:
        """Whether both can act on one token of some sequence."""
        return {self.phase, other.phase} != {"prompt", "generation"}


class Edit(msgspec.Struct, frozen=True, array_like=True):
    """One edit row: read f along `read` (None: f = 0), write g(f) - f along `write`.

    site: the hook point that is written, in TransformerLens' spelling. read_site: the one that is read, earlier in the
    same layer; None: `site`.
    norm: the token norm of the SAE, of the stream that is read. What is written is scaled by it even where `read` is
    None.
    """

    site: str
    read: RowRef | None
    write: RowRef
    response: Response
    target: Target
    read_site: str | None = None
    norm: TokenNorm = "none"


class Condition(msgspec.Struct, frozen=True, array_like=True):
    """One condition: the activation f of `read`, of the token's stream at `site`, is above `bound`; where negated, it
    is not.

    norm: the token norm of the SAE.
    """

    site: str
    read: EncoderRow
    bound: float
    negated: bool
    norm: TokenNorm = "none"


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """edits: in canonical order, so equal plans are equal whatever order the client wrote.

    rows: float32 bytes of the inline rows, by SHA-256.
    fingerprint: `sha256:` and the digest of everything that decides the result.
    when: what must hold of a token for the edits to act on it, all of it; in canonical order.
    """

    edits: tuple[Edit, ...]
    rows: dict[str, bytes]
    preserve_norm: bool
    fingerprint: str
    when: tuple[Condition, ...] = ()

    @staticmethod
    def build(edits: list[Edit], rows: dict[str, bytes], preserve_norm: bool, when: Iterable[Condition] = ()) -> Plan:
        ordered = tuple(sorted(edits, key=msgspec.msgpack.encode))
        conditions = tuple(sorted(set(when), key=msgspec.msgpack.encode))
        # Inline rows are named by their hashes in `edits`, SAEs likewise: the edits say it all.
        content = ("steering plan 2", ordered, preserve_norm, *conditions)
        digest = hashlib.sha256(msgspec.msgpack.encode(content))
        return Plan(ordered, rows, preserve_norm, f"sha256:{digest.hexdigest()}", conditions)

    @property
    def n_rows(self) -> int:
        """Edit rows in a step table: the edits', and the conditions'."""
        return len(self.edits) + len(self.when)

    def without(self, sites: Collection[str]) -> Plan:
        """The part that is not written at `sites`."""
        if not any(edit.site in sites for edit in self.edits):
            return self
        part = msgspec.structs.replace(self, edits=tuple(edit for edit in self.edits if edit.site not in sites))
        inline = {ref.sha256 for ref in part.row_refs() if isinstance(ref, InlineRow)}
        return msgspec.structs.replace(part, rows={sha256: self.rows[sha256] for sha256 in inline})

    def row_refs(self) -> frozenset[RowRef]:
        """The distinct rows that the plan needs in the bank."""
        refs = {edit.write for edit in self.edits} | {edit.read for edit in self.edits if edit.read is not None}
        return frozenset(refs | {condition.read for condition in self.when})


def encode_plan(plan: Plan) -> bytes:
    return msgspec.msgpack.encode(plan)


_decoder = msgspec.msgpack.Decoder(Plan)


def decode_plan(data: bytes) -> Plan:
    return _decoder.decode(data)
