"""What there is to know of an SAE before it is served."""

from __future__ import annotations

import re
import shlex
from typing import Any

import torch

from sae_models import SAE, HookPoint
from sae_models.families import FAMILIES


def describe(sae: SAE, location: str, shipped: bool) -> dict[str, Any]:
    """Facts about `sae`, for JSON. location: as it was typed; shipped: whether that is the name of one of ours.

    Reads every weight once, for the norms of the decoder's rows.
    """
    norms = torch.cat([decoder.norm(dim=-1) for _, _, _, decoder in sae.blocks()])
    matrices = (sae.weights.W_enc, sae.weights.W_dec)
    files = dict.fromkeys(matrix.source.path for matrix in matrices)
    return {
        "name": sae.name,
        "family": sae.family,
        "version": next(family.VERSIONS for family in FAMILIES if sae.family == family.NAME),
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "d_sae": sae.d_sae,
        "k": sae.selection.k if sae.selection is not None else None,
        "reads": [_place(point) for point in sae.hook_points],
        "writes": [_place(point) for point in sae.hook_points_out],
        "token_norm": sae.token_norm,
        "model": sae.model_name,
        "skip_first": sae.skip_first,
        "dtype": str(sae.weights.W_enc.source.dtype(sae.weights.W_enc.name)).removeprefix("torch."),
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in files],
        "sha256": sae.sha256,
        "decoder_norms": _spread(norms),
        "thresholds": _thresholds(sae),
        "serve": serve_command(sae, None if shipped else location),
    }


def serve_command(sae: SAE, location: str | None) -> str | None:
    """The command that serves what lies at `location` (None: it ships); None where the engine has no site for it."""
    if not all(point.armable for point in sae.hook_points + sae.hook_points_out):
        return None
    command = f"steer-server serve {shlex.quote(sae.model_name or 'MODEL')}"
    if location is None:
        return command
    name = re.sub(r"[^A-Za-z0-9._/-]+", "-", sae.name).strip("-./") or "NAME"
    return f"{command} --sae {shlex.quote(f'{name}={location}')}"


def _place(point: HookPoint) -> dict[str, Any]:
    return {"hook_point": str(point), "armable": point.armable}


def _spread(values: torch.Tensor) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def _thresholds(sae: SAE) -> dict[str, Any] | None:
    """Spread of the finite thresholds, and how many features none can exceed; None where no feature has one."""
    thresholds = sae.thresholds()
    finite = thresholds[torch.isfinite(thresholds)]
    if not bool((thresholds > 0).any()):
        return None
    return {**(_spread(finite) if len(finite) else {}), "never_on": len(thresholds) - len(finite)}
