"""The start-up check of the Triton kernels that will steer: compiled here and now, they do what the torch path does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steer_kernels.apply_edits import Gates, SiteEdits, StepTable, TableEdits, TokenNorm, TopKEncoder, prepare_edits
from steer_server.engine.self_test import SelfTestError, site_edits

SEED = 22
FEW = 5
"""Tokens of a decode step."""
TOLERANCE = 8
"""Units in the last place of the largest value. Each path rounds once; float32 sums differ by a few more."""
RANKED_TOLERANCE = 1e-2
"""Of the largest value, where features are ranked: one that is on in the one path and off in the other is off by 1."""
CLEAR = 0.05
"""How far ahead a feature that is at 1 must be for no rounding to change its rank."""
CANDIDATES = 64
"""Features of an encoder among which the one to be asked for is looked for."""


def run_kernel_test(
    d_model: int, dtype: torch.dtype, device: torch.device, encoders: Sequence[TopKEncoder] = ()
) -> None:
    """Edit random streams by both, as few tokens and as many as share their rows, and rank a feature of each encoder.

    It also compiles the kernels' variants, which the first steered requests would otherwise wait for. encoders: those
    that requests will read through. Raises SelfTestError.
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
                every | dict(read=-1, write=3, scale=1, shift=1, gate=0),
                every | dict(read=-1, write=0, scale=1, shift=100, gate=1),
                # One gate is open and one is closed, as no rounding changes.
                every | dict(read=2, write=-1, scale=1, low=0, bias=100, gate=0),
                every | dict(read=3, write=-1, scale=1, low=0, bias=100, gate=1),
                every | dict(read=2, write=-1, scale=-1, low=0, bias=100, gate=1),
            ]
        )
        for residual in (None, random(tokens, d_model)):
            _compare(edits, rows, random(tokens, d_model), residual, (), TOLERANCE * torch.finfo(dtype).eps)
        for number, encoder in enumerate(encoders):
            feature = _clear_feature(encoder)
            if feature is None:
                continue
            row = encoder.W_enc[:, feature]
            stream = row / row.square().sum()
            # Every other token has the feature on, at 1 but for its bias.
            on = torch.zeros(tokens, 1, device=device)
            on[::2] = 1.0
            hidden = (on * stream).to(dtype)
            bias = float(encoder.b_enc[feature])
            asked = every | dict(read=0, write=1, bias=bias, threshold=0.5, shift=2, encoder=number, feature=feature)
            bank = torch.stack([row, stream]).to(dtype)
            for residual in (None, torch.zeros_like(hidden)):
                _compare(site_edits([asked]), bank, hidden, residual, encoders, RANKED_TOLERANCE)


def _clear_feature(encoder: TopKEncoder) -> int | None:
    """A feature whose membership, where the stream is its own direction, no rounding decides; None where none is found,
    as in an encoder that was not trained."""
    # Of the first group, which ranks by itself.
    W_enc, b_enc = encoder.W_enc[:, : encoder.group_size], encoder.b_enc[: encoder.group_size]
    features = torch.arange(min(CANDIDATES, encoder.group_size), device=b_enc.device)
    columns = W_enc[:, features]
    streams = (columns / columns.square().sum(0).clamp(min=1e-30)).T
    pre_acts = torch.addmm(b_enc, streams, W_enc)
    own = pre_acts.gather(1, features.unsqueeze(1)).squeeze(1)
    others = (pre_acts.abs() if encoder.absolute else pre_acts).scatter(1, features.unsqueeze(1), -torch.inf)
    # Ahead of the last that would survive without it.
    margin = own - others.topk(min(encoder.k, others.shape[1]), dim=1).values[:, -1]
    # A bias could put it above the threshold by itself.
    margin = torch.where(b_enc[features] < 0.25, margin, -torch.inf)
    return int(margin.argmax()) if bool(margin.max() > CLEAR) else None


def _compare(
    edits: SiteEdits,
    rows: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    encoders: Sequence[TopKEncoder],
    tolerance: float,
) -> None:
    """Raise SelfTestError where the kernel's edits of `hidden` are further from the torch path's than `tolerance` times
    the largest value."""
    (tokens, d_model), dtype, device = hidden.shape, hidden.dtype, hidden.device
    expected, found = hidden.clone(), hidden.clone()
    conditions, acting = edits.take(edits.is_condition), edits.take(~edits.is_condition)
    gates = None
    if len(conditions):
        gates = Gates.of(conditions, np.zeros(len(conditions), dtype=np.int64), rows, encoders)
        for reads in gates.reads:
            reads.read(expected, residual)
    prepare_edits(acting, rows, encoders, gates).apply(expected, residual)
    table = StepTable(rows, 1, encoders)
    none = np.zeros(len(edits), dtype=np.int64)
    table.fill(edits, none, none)
    TableEdits(table, 0).apply(found, residual)
    error = float((found.float() - expected.float()).abs().max())
    largest = float(expected.float().abs().max())
    if not error <= tolerance * largest or int(table.edited) != tokens:
        ranked = "" if not encoders else " and count_above, which it asks,"
        raise SelfTestError(
            f"the Triton kernel apply_edits{ranked} is wrong on {device} ({dtype}, d_model {d_model}): of {tokens} "
            f"tokens it edited {int(table.edited)}, off by up to {error:.3g} where values reach {largest:.3g}"
        )
