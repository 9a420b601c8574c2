"""The edit rows of one forward at all sites, in device memory of fixed shape that one copy fills."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from steer_kernels.apply_edits.edits import IntArray, SiteEdits, TokenNorm

WORDS = 16
"""32-bit words of an edit's record, of which the last are unused: a record is one line of 64 bytes."""
INTEGERS = ("start", "stop", "read", "write", "norm", "preserve_norm")
FLOATS = ("bias", "threshold", "scale", "shift", "low", "high")
READ_ORDER = len(INTEGERS) + len(FLOATS)
"""The word of record i that names the edit which is i-th in the order of reading."""
HOST_BUFFERS = 3
"""vLLM prepares a step while the one before runs, so a buffer may still be on its way when the next is filled."""


class TableCapacityError(ValueError):
    """More tokens, groups or edits than the table was made for."""


class StepTable:
    """Which edits act on which tokens, as `apply_table` reads it.

    Tokens whose edits overlap form a group, in the engine the tokens of one request; edits of different groups share no
    token. Edits are sorted by (group, site that is written), their reads by (group, site that is read), and each order
    has one offset for each (group, site): a program finds what its token needs in two loads and leaves where that is
    nothing.

    max_tokens, max_edits: of one forward. max_groups: at most the requests of one forward. max_group_edits: of one
    request, at all sites.
    """

    def __init__(
        self,
        bank: torch.Tensor,
        n_sites: int,
        max_tokens: int,
        max_groups: int,
        max_edits: int,
        max_group_edits: int,
    ) -> None:
        self.bank = bank
        self.n_sites = n_sites
        self._limits = {
            "tokens": max_tokens,
            "steered requests": max_groups,
            "edits": max_edits,
            "edits of one request": max_group_edits,
        }
        offsets = max_groups * n_sites + 1
        sizes = (max_tokens, offsets, offsets, max_edits * WORDS)
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        on_gpu = bank.device.type == "cuda"
        self._hosts = [
            torch.zeros(self._starts[-1], dtype=torch.int32, pin_memory=on_gpu)
            for _ in range(HOST_BUFFERS if on_gpu else 1)
        ]
        self._copied = [torch.cuda.Event() if on_gpu else None for _ in self._hosts]
        self._turn = 0
        self._device = torch.zeros(self._starts[-1], dtype=torch.int32, device=bank.device)
        self.token_group, self.first_write, self.first_read, self.records = (
            self._device[start:stop] for start, stop in zip(self._starts[:-1], self._starts[1:], strict=True)
        )
        self.coefficients = torch.zeros(max_tokens, max_group_edits, dtype=torch.float32, device=bank.device)
        """What each edit of a token's group multiplies its row by; reads leave them for writes."""
        self.edited = torch.zeros(n_sites, dtype=torch.int32, device=bank.device)
        """Tokens edited at each site since the table was made, counted where it happens."""

    @property
    def nbytes(self) -> int:
        """Device memory held."""
        return self._device.nbytes + self.coefficients.nbytes + self.edited.nbytes

    def fill(self, edits: SiteEdits, site: IntArray) -> None:
        """Hold `edits`, at least one, each on at least one token; `site` [E]: where each is written.

        Edits go through no encoder: membership is decided elsewhere. Raises TableCapacityError.
        """
        if bool((edits.encoder >= 0).any()):
            raise ValueError("edits whose features are compared with others of their SAE are not for this table")
        group = token_groups(edits)
        # What neither reads nor is scaled depends on no stream, so it is known where it is written.
        local = (edits.source < 0) | ((edits.read < 0) & (edits.norm == TokenNorm.NONE))
        source = np.where(local, site, edits.source)
        order = np.lexsort((site, group))
        edits, site, group, source = edits.take(order), site[order], group[order], source[order]
        by_read = np.lexsort((source, group))
        n_tokens, n_groups = int(edits.stop.max()), int(group[-1]) + 1
        most = int(np.bincount(group).max())
        for (what, limit), used in zip(self._limits.items(), (n_tokens, n_groups, len(edits), most), strict=True):
            if used > limit:
                raise TableCapacityError(f"a forward has {used} {what}; the step table holds {limit}")

        host = self._next_host()
        token_group, first_write, first_read, records = (
            host[start:stop] for start, stop in zip(self._starts[:-1], self._starts[1:], strict=True)
        )
        first = np.full(n_groups, n_tokens)
        np.minimum.at(first, group, edits.start)
        last = np.zeros(n_groups, dtype=np.int64)
        np.maximum.at(last, group, edits.stop)
        edges = np.stack([first, last], axis=1).ravel()
        labels = np.stack([np.full(n_groups, -1), np.arange(n_groups)], axis=1).ravel()
        token_group[:n_tokens] = np.repeat(labels, np.diff(edges, prepend=0))
        token_group[n_tokens:] = -1
        n_offsets = n_groups * self.n_sites
        first_write[: n_offsets + 1] = _offsets(group * self.n_sites + site, n_offsets)
        first_read[: n_offsets + 1] = _offsets((group * self.n_sites + source)[by_read], n_offsets)
        used_records = records[: len(edits) * WORDS].reshape(len(edits), WORDS)
        for word, name in enumerate(INTEGERS):
            used_records[:, word] = getattr(edits, name)
        for word, name in enumerate(FLOATS, len(INTEGERS)):
            used_records[:, word] = getattr(edits, name).astype(np.float32).view(np.int32)
        used_records[:, READ_ORDER] = by_read
        self._copy(self._starts[3] + len(edits) * WORDS)

    def _next_host(self) -> npt.NDArray[np.int32]:
        self._turn = (self._turn + 1) % len(self._hosts)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._hosts[self._turn].numpy()

    def _copy(self, words: int) -> None:
        self._device[:words].copy_(self._hosts[self._turn][:words], non_blocking=True)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.record()


def token_groups(edits: SiteEdits) -> IntArray:
    """[E] the group of each edit: edits whose tokens overlap, directly or through others, share one.

    Groups are numbered by their first token.
    """
    order = np.argsort(edits.start, kind="stable")
    reached = np.maximum.accumulate(edits.stop[order])
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = edits.start[order][1:] >= reached[:-1]
    group = np.empty(len(order), dtype=np.int64)
    group[order] = np.cumsum(begins) - 1
    return group


def _offsets(keys: IntArray, n: int) -> IntArray:
    """[n + 1] where each of the keys 0 to n - 1 begins among sorted `keys`."""
    return np.searchsorted(keys, np.arange(n + 1))


