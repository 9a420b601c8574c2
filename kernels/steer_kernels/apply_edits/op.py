"""The custom op that a compiled model calls at each armed hook point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class AppliedEdits(Protocol):
    """The edits of one site in the form of whatever applies them: the torch path's, or a step table's."""

    @property
    def ready(self) -> bool:
        """Whether everything that they read at other sites was read in this forward."""

    def apply(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Edit `hidden` in place; only where they are ready."""

    def forget(self) -> None:
        """Forget what was read: a forward begins."""


class ReadsForLater(Protocol):
    """What later sites of the forward need of the stream that comes in at one."""

    def read(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Read the stream before it is edited here, and leave what they need behind."""

    def forget(self) -> None:
        """Forget what was read: a forward begins."""


class Site:
    """An armed hook point and what the current forward needs there."""

    def __init__(self) -> None:
        self.edits: AppliedEdits | None = None
        self.reads: list[ReadsForLater] = []
        self.runs = 0
        """How often edits were applied here; the engine compares it with what it asked for."""

    def start_forward(self) -> None:
        self.runs = 0
        for reads in self.reads:
            reads.forget()
        if self.edits is not None:
            self.edits.forget()

    def apply(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        for reads in self.reads:
            reads.read(hidden, residual)
        # Half of the edits would pass for all of them: where another site was not read, nothing is applied or counted.
        if self.edits is not None and self.edits.ready:
            self.edits.apply(hidden, residual)
            self.runs += 1


class CapturingSite(Site):
    """A site that keeps what leaves it: for measurements, so that the sites of a server pay nothing for them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0
        """How many of the next forward's rows are tokens; the rest is padding."""
        self.captured: list[torch.Tensor] = []
        """The stream [tokens, d_model] of each forward, float32."""

    def apply(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        super().apply(hidden, residual)
        stream = hidden[: self.tokens].to(torch.float32, copy=True)
        self.captured.append(stream if residual is None else stream.add_(residual[: self.tokens].float()))


_bound: Sequence[Site] = ()


def bind_sites(sites: Sequence[Site]) -> None:
    """Make `sites` the ones that the op's `site` argument indexes, from now on and in this process.

    The index is a constant of the compiled graph, which vLLM caches on disk and loads in other processes, so it must
    mean the same everywhere: the engine numbers its sites from 0 and binds its own before each forward.
    """
    global _bound
    _bound = sites


def _apply_edits(hidden: torch.Tensor, residual: torch.Tensor | None, site: int) -> None:
    if site < len(_bound):
        _bound[site].apply(hidden, residual)


def _apply_edits_fake(hidden: torch.Tensor, residual: torch.Tensor | None, site: int) -> None:
    return None


# In place on the module's own output: Inductor then calls the op on that buffer and allocates nothing, where a
# functional op would copy the stream at every layer of every idle step.
_library = torch.library.Library("steer_kernels", "FRAGMENT")
_library.define("apply_edits(Tensor(a!) hidden, Tensor? residual, int site) -> ()")
_library.impl("apply_edits", _apply_edits, "CompositeExplicitAutograd")
torch.library.register_fake("steer_kernels::apply_edits", _apply_edits_fake, lib=_library)

apply_edits = torch.ops.steer_kernels.apply_edits
"""apply_edits(hidden, residual, site): edit `hidden` [tokens, d_model] in place at bound site number `site`."""
