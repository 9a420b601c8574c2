"""The edit rows of one forward at all sites, in device memory that one copy fills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
import torch

from steer_kernels.apply_edits.edits import IntArray, SiteEdits, TokenNorm, TopKEncoder

WORDS = 16
"""32-bit words of an edit's record: one line of 64 bytes."""
INTEGERS = ("start", "stop", "read", "write", "norm", "preserve_norm", "encoder", "feature")
FLOATS = ("bias", "threshold", "scale", "shift", "low", "high")
READ_ORDER = len(INTEGERS) + len(FLOATS)
"""The word of record i that names the edit which is i-th in the order of reading."""
GATE = READ_ORDER + 1
"""The word that says where the conditions are which must hold: the first, counted from the first edit of the group,
plus `GATE_COUNT` times how many they are; 0 without a gate."""
GATE_COUNT = 1 << 16
MAX_CONDITIONS = (1 << 15) - 1
"""Of one gate: the word is signed."""
HOST_BUFFERS = 3
"""vLLM prepares a step while the one before runs, so a buffer may still be on its way when the next is filled."""
MAX_RANKED = 128
"""Edits of one request and site for which features are ranked one by one: count_above takes so many at once."""


@dataclass(frozen=True)
class Ranking:
    """Features that are compared with those of their group of an encoder, as the edits that read at one site need.

    encoder: its number. group: that of the features in it. norm: of the stream that is read.
    """

    encoder: int
    group: int
    norm: TokenNorm


@dataclass(frozen=True)
class Room:
    """What a table holds without growing. edits: of all groups together; edits_a_group: of the group with most."""

    tokens: int = 1
    groups: int = 1
    edits: int = 1
    edits_a_group: int = 1

    def holds(self, needed: Room) -> bool:
        return all(need <= has for need, has in zip(astuple(needed), astuple(self), strict=True))


class StepTable:
    """Which edits act on which tokens, as `apply_table` reads it.

    Edits come in groups, in the engine those of one request, that share no token. Edits are sorted by (group, site that
    is written), their reads by (group, site that is read), and each order has one offset for each (group, site): a
    program finds what its token needs in two loads and leaves where that is nothing. Conditions of gates, which write
    nothing, come first in their group, at a site before all others.

    Buffers have room for what `room` says. Where a forward needs more they grow, by doubling, and are kept. While they
    do not, a CUDA graph may hold them: what launches depend on beside the buffers is in `any_launch`.

    bank: [capacity, d_model], the rows, read in place. encoders: those that edits number.
    token_group: [tokens] int32, -1 where no edit acts. first_write, first_read: [groups * group_offsets + 1] int32.
    records: [edits * WORDS] int32.
    coefficients: [tokens * edits of a group] float32, what each edit multiplies its row by; reads leave them for
        writes. Of a condition, 1 where it holds. pre_acts, survival: likewise, of edits that go through an encoder: the
        pre-activation there, and what the activation is multiplied by, 0 where the feature does not survive.
    edited: [sites] int32, the tokens edited at each site since the table was made, counted where it happens.
    """

    def __init__(
        self, bank: torch.Tensor, n_sites: int, encoders: Sequence[TopKEncoder] = (), room: Room = Room()
    ) -> None:
        self.bank = bank
        self.encoders = encoders
        self.n_sites = n_sites
        self.group_offsets = n_sites + 1
        """Of a group in each order. first_write begins with its conditions; first_read has one to spare."""
        self.edited = torch.zeros(n_sites, dtype=torch.int32, device=bank.device)
        written = room.tokens * room.edits_a_group
        self.coefficients, self.pre_acts, self.survival = (
            torch.zeros(size, dtype=torch.float32, device=bank.device)
            for size in (written, *[written if encoders else 0] * 2)
        )
        self.stride = room.edits_a_group
        """Coefficients of a token that there is room for."""
        self.columns = 0
        """Edits of the group that has most: so many of them are looked at where features are ranked."""
        self.longest_group = 0
        """Tokens from the first to the last of the group that has most."""
        self.rankings: dict[int, list[Ranking]] = {}
        """By the site where they are read."""
        self._holds_edits = False
        self._turn = 0
        self._sizes: tuple[int, ...]
        self._allocate((room.tokens, room.groups, room.edits))

    @property
    def nbytes(self) -> int:
        """Device memory held."""
        buffers = (self._device, self.coefficients, self.pre_acts, self.survival, self.edited)
        return sum(buffer.nbytes for buffer in buffers)

    def fill(self, edits: SiteEdits, site: IntArray, group: IntArray) -> None:
        """Hold `edits`, at least one, each on at least one token.

        site [E]: where each is written; a condition, where it is read. group [E]: whose each is, numbered from 0 in the
        order of their tokens, each number used; the spans from the first to the last token of two groups do not
        overlap.
        Raises ValueError for more conditions than a record can name.
        """
        # What neither reads nor is scaled depends on no stream, so it is known where it is written.
        local = (edits.source < 0) | ((edits.read < 0) & (edits.norm == TokenNorm.NONE))
        source = np.where(local, site, edits.source)
        site = np.where(edits.is_condition, -1, site)
        # Conditions of one gate lie together.
        order = np.lexsort((edits.gate, site, group))
        edits, site, group, source = edits.take(order), site[order], group[order], source[order]
        by_read = np.lexsort((source, group))
        n_tokens, n_groups = int(edits.stop.max()), int(group[-1]) + 1
        self.columns = int(np.bincount(group).max())
        self.stride = max(self.stride, self.columns)
        self.rankings = self._rankings(edits, source)
        self._grow(n_tokens, n_groups, len(edits))
        self._holds_edits = True

        host = self._next_host()
        token_group, first_write, first_read, records = self._parts(host)
        first = np.full(n_groups, n_tokens)
        np.minimum.at(first, group, edits.start)
        last = np.zeros(n_groups, dtype=np.int64)
        np.maximum.at(last, group, edits.stop)
        self.longest_group = int((last - first).max())
        edges = np.stack([first, last], axis=1).ravel()
        labels = np.stack([np.full(n_groups, -1), np.arange(n_groups)], axis=1).ravel()
        token_group[:n_tokens] = np.repeat(labels, np.diff(edges, prepend=0))
        token_group[n_tokens:] = -1
        n_offsets, of_group = n_groups * self.group_offsets, group * self.group_offsets
        first_write[: n_offsets + 1] = _offsets(of_group + site + 1, n_offsets)
        first_read[: n_offsets + 1] = _offsets((of_group + source)[by_read], n_offsets)
        used_records = records[: len(edits) * WORDS].reshape(len(edits), WORDS)
        for word, name in enumerate(INTEGERS):
            used_records[:, word] = getattr(edits, name)
        for word, name in enumerate(FLOATS, len(INTEGERS)):
            used_records[:, word] = getattr(edits, name).astype(np.float32).view(np.int32)
        used_records[:, READ_ORDER] = by_read
        used_records[:, GATE] = _gate_words(edits, group)
        self._copy(self._starts[3] + len(edits) * WORDS)

    def clear(self) -> None:
        """Hold no edit, on the device too."""
        if self._holds_edits:
            token_group = self._parts(self._next_host())[0]
            token_group[:] = -1
            self._copy(len(token_group))
            self._holds_edits = False

    def any_launch(self, rankings: dict[int, list[Ranking]]) -> None:
        """Hold no edit, but take the launches of every forward whose edits there is room for and whose features are
        ranked as `rankings` say, by the site where they are read: for a CUDA graph, which is to hold them.

        In the row form only, which is right for any groups, and the one for decoding.
        """
        self.clear()
        self.rankings = rankings
        self.columns = self.stride
        self.longest_group = 0

    @property
    def held_tokens(self) -> int:
        """Tokens from there on are nobody's."""
        return self._sizes[0]

    def _rankings(self, edits: SiteEdits, source: IntArray) -> dict[int, list[Ranking]]:
        found: dict[int, list[Ranking]] = {}
        through = np.flatnonzero(edits.encoder >= 0)
        if not len(through):
            return found
        sizes = np.array([encoder.group_size for encoder in self.encoders])
        group = edits.feature[through] // sizes[edits.encoder[through]]
        kinds = np.unique(
            np.stack([source[through], edits.encoder[through], group, edits.norm[through]], axis=1), axis=0
        )
        for site, encoder, number, norm in kinds.tolist():
            found.setdefault(site, []).append(Ranking(encoder, number, TokenNorm(norm)))
        return found

    def _grow(self, *needed: int) -> None:
        grown = tuple(size if need <= size else 2 * need for need, size in zip(needed, self._sizes, strict=True))
        if grown != self._sizes:
            self._allocate(grown)
        # Of all tokens that are held, since a forward may have more than those that are steered.
        n_coefficients = self.held_tokens * self.stride
        if n_coefficients > len(self.coefficients):
            self.coefficients = self.coefficients.new_zeros(2 * n_coefficients)
        if self.rankings and n_coefficients > len(self.survival):
            self.pre_acts = self.pre_acts.new_zeros(2 * n_coefficients)
            self.survival = self.survival.new_zeros(2 * n_coefficients)

    def _allocate(self, sizes: tuple[int, ...]) -> None:
        """sizes: tokens, groups and edits to make room for."""
        tokens, groups, edits = self._sizes = sizes
        offsets = groups * self.group_offsets + 1
        # Each part begins on a line: Triton compiles a kernel for pointers that do and another for those that do not.
        lines = [-(-words // WORDS) for words in (tokens, offsets, offsets, edits * WORDS)]
        self._starts = (np.cumsum([0, *lines]) * WORDS).tolist()
        on_gpu = self.bank.device.type == "cuda"
        self._hosts = [
            torch.zeros(self._starts[-1], dtype=torch.int32, pin_memory=on_gpu)
            for _ in range(HOST_BUFFERS if on_gpu else 1)
        ]
        self._copied = [torch.cuda.Event() if on_gpu else None for _ in self._hosts]
        self._device = torch.zeros(self._starts[-1], dtype=torch.int32, device=self.bank.device)
        self.token_group, self.first_write, self.first_read, self.records = (
            self._device[start:stop] for start, stop in zip(self._starts[:-1], self._starts[1:], strict=True)
        )

    def _parts(self, host: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        return [host[start:stop] for start, stop in zip(self._starts[:-1], self._starts[1:], strict=True)]

    def _next_host(self) -> npt.NDArray[np.int32]:
        self._turn = (self._turn + 1) % len(self._hosts)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        array: npt.NDArray[np.int32] = self._hosts[self._turn].numpy()
        return array

    def _copy(self, words: int) -> None:
        self._device[:words].copy_(self._hosts[self._turn][:words], non_blocking=True)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.record()


def _offsets(keys: IntArray, n: int) -> IntArray:
    """[n + 1] where each of the keys 0 to n - 1 begins among sorted `keys`."""
    return np.searchsorted(keys, np.arange(n + 1))


def _gate_words(edits: SiteEdits, group: IntArray) -> IntArray:
    """[E] the words that say where the conditions of each edit's gate are; edits as they lie in a table."""
    words = np.zeros(len(edits), dtype=np.int64)
    conditions = np.flatnonzero(edits.is_condition)
    gated = np.flatnonzero(~edits.is_condition & (edits.gate >= 0))
    if len(gated):
        gates, first, count = np.unique(edits.gate[conditions], return_index=True, return_counts=True)
        gate = np.searchsorted(gates, edits.gate[gated])
        place = conditions[first[gate]] - np.searchsorted(group, group[gated])
        if place.max() >= GATE_COUNT or count.max() > MAX_CONDITIONS:
            raise ValueError(f"a gate has {count.max()} conditions; a record names {MAX_CONDITIONS} of {GATE_COUNT}")
        words[gated] = place + count[gate] * GATE_COUNT
    return words
