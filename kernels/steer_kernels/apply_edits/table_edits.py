"""What a step table holds for one site, as the op applies it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steer_kernels.apply_edits.step_table import StepTable


class TableEdits:
    """The edits that read or write at one site of a `StepTable`, applied by the Triton kernel.

    sources: those of the sites that are read for what is written here.
    """

    def __init__(self, table: StepTable, site: int, sources: Sequence[TableEdits] = ()) -> None:
        # Machines without a GPU need no Triton.
        from steer_kernels.apply_edits.triton_kernel import apply_table

        self._apply_table = apply_table
        self._table = table
        self._site = site
        self._sources = sources
        self._applied = False

    @property
    def ready(self) -> bool:
        return all(source._applied for source in self._sources)

    def apply(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        self._apply_table(hidden, residual, self._table, self._site)
        self._applied = True

    def read(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """At a site where the table writes nothing: reads and writes are one launch."""
        self.apply(hidden, residual)

    def forget(self) -> None:
        self._applied = False
