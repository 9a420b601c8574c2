"""Forwards that a CUDA graph replays whole: no Python runs at their sites; what they did is what the kernel counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from steer_kernels.apply_edits import StepTable
from steer_server.engine.host_copy import HostCopy
from steer_server.engine.self_test import site_edits


class Graphs(Enum):
    """From which CUDA graphs a forward may be replayed.

    VANILLA: vLLM's own, of whole forwards too: no site has work. STEERED: of whole forwards, those with every site's
    launch in them. PIECES: of what lies between sites, where the op then runs.
    """

    VANILLA = "vanilla"
    STEERED = "steered"
    PIECES = "pieces"


def edited_tokens(
    start: npt.NDArray[np.int64], stop: npt.NDArray[np.int64], site: npt.NDArray[np.int64], n_sites: int
) -> npt.NDArray[np.int64]:
    """[sites]: on how many tokens the edits [start, stop) at each site act, of which several may share one."""
    if not len(site):
        return np.zeros(n_sites, dtype=np.int64)
    order = np.lexsort((start, site))
    # One site after the other on a line, where the part of a span behind all spans before it is new.
    offset = site[order] * int(stop.max())
    start, stop = start[order] + offset, stop[order] + offset
    reached = np.concatenate([[0], np.maximum.accumulate(stop)[:-1]])
    new = np.maximum(stop - np.maximum(start, reached), 0)
    return np.bincount(site[order], weights=new, minlength=n_sites).astype(np.int64)


@dataclass(frozen=True)
class ReplayedForward:
    """What a forward that was replayed whole should have edited, and the kernel's counts around it.

    sites: hook points. expected: [sites] tokens. before, after: [sites] int32.
    """

    sites: tuple[str, ...]
    expected: npt.NDArray[np.int64]
    before: HostCopy
    after: HostCopy

    def missing_sites(self) -> list[str]:
        """Where it edited other than was asked. Waits for the forward."""
        # The counter goes round at 2**31.
        edited = (self.after.values() - self.before.values()).numpy()
        return [site for site, n, wanted in zip(self.sites, edited, self.expected, strict=True) if n != wanted]


def sites_that_do_not_launch(table: StepTable, room_a_group: int, replay: Callable[[], object]) -> list[int]:
    """The sites whose edits a captured forward of one token or more does not apply, as it is replayed with an edit of
    no effect at each site.

    room_a_group: edits of one request that the table has room for. Waits for the device.
    """
    wrong: list[int] = []
    for first in range(0, table.n_sites, room_a_group):
        asked = np.arange(first, min(first + room_a_group, table.n_sites))
        # Nothing is read, and zero times the row is written, to the first token.
        nothing = site_edits([{"stop": 1, "read": -1, "scale": 1.0}] * len(asked))
        table.fill(nothing, asked, np.zeros(len(asked), dtype=np.int64))
        before = table.edited.cpu().numpy().copy()
        replay()
        edited = table.edited.cpu().numpy() - before
        wanted = np.zeros(table.n_sites, dtype=np.int64)
        wanted[asked] = 1
        wrong += np.flatnonzero(edited != wanted).tolist()
    table.clear()
    return sorted(set(wrong))
