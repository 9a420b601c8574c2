"""The start-up check of the Triton kernel that will steer: compiled here and now, it does what the torch path does."""

from __future__ import annotations

import numpy as np
import torch

from steer_kernels.apply_edits import StepTable, TableEdits, TokenNorm, prepare_edits
from steer_server.engine.self_test import SelfTestError, site_edits

SEED = 22
FEW = 5
"""Tokens of a decode step."""
TOLERANCE = 8
"""Units in the last place of the largest value. Each path rounds once; float32 sums differ by a few more."""


def run_kernel_test(d_model: int, dtype: torch.dtype, device: torch.device) -> None:
    """Edit random streams by both, as few tokens and as many as share their rows. Raises SelfTestError.

    It also compiles the kernel's variants, which the first steered requests would otherwise wait for.
    """
    from steer_kernels.apply_edits.triton_kernel import GROUPED_FROM

    generator = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    rows = random(4, d_model) / d_model**0.5
    for tokens in (FEW, GROUPED_FROM):
        every: dict[str, float] = dict(stop=tokens)
        edits = site_edits(
            [
                every | dict(read=0, write=1, bias=0.1, threshold=0, shift=2, preserve_norm=True),
                every | dict(read=1, write=2, scale=1.5, norm=TokenNorm.CONSTANT_NORM),
                every | dict(read=-1, write=3, scale=1, shift=1),
            ]
        )
        for residual in (None, random(tokens, d_model)):
            hidden = random(tokens, d_model)
            expected, found = hidden.clone(), hidden.clone()
            prepare_edits(edits, rows).apply(expected, residual)
            table = StepTable(rows, 1)
            none = np.zeros(len(edits), dtype=np.int64)
            table.fill(edits, none, none)
            TableEdits(table, 0).apply(found, residual)
            error = float((found.float() - expected.float()).abs().max())
            largest = float(expected.float().abs().max())
            if not error <= TOLERANCE * torch.finfo(dtype).eps * largest or int(table.edited) != tokens:
                raise SelfTestError(
                    f"the Triton kernel apply_edits is wrong on {device} ({dtype}, d_model {d_model}): of {tokens} "
                    f"tokens it edited {int(table.edited)}, off by up to {error:.3g} where values reach {largest:.3g}"
                )
