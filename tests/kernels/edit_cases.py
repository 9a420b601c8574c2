"""Edits from what tests say of them, applied in each form that they have, beside their definition."""

from dataclasses import replace

import numpy as np
import torch

from steer_kernels.apply_edits import (
    Gates,
    SiteEdits,
    TokenNorm,
    TopKEncoder,
    apply_edits_reference,
    apply_prepared,
    prepare_edits,
)
from steer_kernels.apply_edits.reference import token_scales
from steer_kernels.apply_edits.step_table import StepTable
from tests.kernels.conftest import INTERPRETED

INF = float("inf")


def build_edits(records: list[dict]) -> SiteEdits:
    """SiteEdits from dicts; what a record leaves out is neutral (reads nothing, adds nothing)."""
    neutral = dict(
        start=0, stop=1, read=-1, write=0, bias=0.0, threshold=-INF, scale=1.0, shift=0.0,
        low=-INF, high=INF, encoder=-1, feature=0, norm=0, source=-1, preserve_norm=False, gate=-1,
    )  # fmt: skip
    integers = ("start", "stop", "read", "write", "encoder", "feature", "norm", "source", "gate")
    dtypes = dict.fromkeys(integers, np.int64) | {"preserve_norm": bool}
    rows = [neutral | record for record in records]
    return SiteEdits(
        **{name: np.array([r[name] for r in rows], dtype=dtypes.get(name, np.float32)) for name in neutral}
    )


def token_groups(edits: SiteEdits) -> np.ndarray:
    """[E] the group of each edit: edits whose tokens overlap, directly or through others, share one."""
    order = np.argsort(edits.start, kind="stable")
    reached = np.maximum.accumulate(edits.stop[order])
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = edits.start[order][1:] >= reached[:-1]
    group = np.empty(len(order), dtype=np.int64)
    group[order] = np.cumsum(begins) - 1
    return group


def run(form, hidden, residual, rows, edits, encoders=(), sources=None):
    """The new hidden; sources: by site, the streams that are read elsewhere, before this site runs."""
    if form in ("rows", "blocks"):
        return run_kernel(hidden, residual, rows, edits, encoders, sources)
    out = hidden.clone()
    conditions, gates = edits.take(edits.is_condition), None
    if len(conditions):
        gates = Gates.of(conditions, conditions.source, rows, encoders)
        for reads in gates.reads:
            reads.forget()
        for reads in gates.reads:
            reads.read(*((hidden, residual) if reads.source < 0 else (sources[reads.source], None)))
    prepared = prepare_edits(edits.take(~edits.is_condition), rows, encoders, gates)
    for remote in prepared.remote:
        remote.read(sources[remote.source], None)
    apply_prepared(out, residual, prepared)
    return out


def run_kernel(hidden, residual, rows, edits, encoders, sources):
    from steer_kernels.apply_edits.triton_kernel import apply_table

    device = "cpu" if INTERPRETED else "cuda"
    n_sites = 2 + max(sources or {}, default=0)
    table = StepTable(rows.to(device), n_sites, [encoder_on(encoder, device) for encoder in encoders])
    table.fill(edits, np.full(len(edits), n_sites - 1), token_groups(edits))
    for site, source in (sources or {}).items():
        read = source.to(device)
        apply_table(read, None, table, site)
        assert torch.equal(read.cpu().nan_to_num(), source.nan_to_num()), "a site that is only read was written"
    out = hidden.to(device, copy=True)
    apply_table(out, None if residual is None else residual.to(device), table, n_sites - 1)
    acting = torch.zeros(len(hidden), dtype=torch.bool)
    for start, stop, write in zip(edits.start, edits.stop, edits.write, strict=True):
        acting[start:stop] |= bool(write >= 0)
    assert table.edited.tolist() == [0] * (n_sites - 1) + [int(acting.sum())]
    return out.cpu()


def encoder_on(encoder: TopKEncoder, device: str) -> TopKEncoder:
    router = None if encoder.router is None else tuple(part.to(device) for part in encoder.router)
    return replace(encoder, W_enc=encoder.W_enc.to(device), b_enc=encoder.b_enc.to(device), router=router)


def assert_matches_reference(form, hidden, residual, rows, edits, encoders=(), sources=None):
    """Within the rounding of one addition in the output's dtype, plus float32 dot products over d_model."""
    out = run(form, hidden, residual, rows, edits, encoders, sources)
    expected = apply_edits_reference(hidden, residual, rows, edits, encoders, sources)
    stream_size = float(expected.abs().max()) + (0.0 if residual is None else float(residual.abs().max()))
    tolerance = 4 * torch.finfo(hidden.dtype).eps * stream_size + 1e-5 * float(rows.abs().max()) * stream_size
    assert (out.double() - expected).abs().max() <= tolerance


def values_that_decide(edits, rows, stream, sources):
    """How far each pre-activation of each row is from where it turns something on or off."""
    distances = [torch.ones(1, dtype=torch.float64)]
    for e in range(len(edits)):
        if edits.read[e] < 0:
            continue
        x = sources.get(int(edits.source[e]), stream).double()[edits.start[e] : edits.stop[e]]
        a = torch.tensor([token_scales(token, TokenNorm(int(edits.norm[e])))[0] for token in x])
        pre = a * (x @ rows[edits.read[e]].double()) + float(edits.bias[e])
        if np.isfinite(edits.threshold[e]):
            distances.append((pre - float(edits.threshold[e])).abs())
        if edits.is_condition[e]:
            distances.append((pre - float(edits.low[e])).abs())
    return torch.cat(distances)


def compare_drawn(form, table, dtype, mean, least_distance):
    """`assert_matches_reference` of a drawn table, on streams of normal numbers around `mean`, unless it proves
    nothing: a value lies within `least_distance` of where it turns something on, or a stream is edited to nothing.

    table: tokens, rows of the bank, records, seed, and whether there is a residual.
    """
    tokens, n_rows, records, seed, has_residual = table
    generator = torch.Generator().manual_seed(seed)
    d_model = 31
    hidden = torch.randn(tokens, d_model, generator=generator).add(mean).to(dtype)
    residual = torch.randn(tokens, d_model, generator=generator).to(dtype) if has_residual else None
    rows = torch.randn(n_rows, d_model, generator=generator).div(d_model**0.5).to(dtype)
    sources = {site: torch.randn(tokens, d_model, generator=generator).to(dtype) for site in (0, 1)}
    edits = build_edits(records)
    stream = hidden.double() if residual is None else hidden.double() + residual.double()
    # Within rounding a feature may fall on either side.
    if values_that_decide(edits, rows, stream, sources).min() < least_distance:
        return
    # The rescaling of preserve_norm divides by the edited norm.
    unscaled = apply_edits_reference(
        hidden, residual, rows, build_edits([r | {"preserve_norm": False} for r in records]), sources=sources
    )
    if (unscaled if residual is None else unscaled + residual.double()).norm(dim=-1).min() < 0.5:
        return
    assert_matches_reference(form, hidden, residual, rows, edits, sources=sources)
