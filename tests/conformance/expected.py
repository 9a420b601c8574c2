"""`expected.safetensors`: what a library answers for one checkpoint, and what a test must know to use it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conformance.inputs import Inputs
from tests.conformance.weights import TIED

Answer = tuple[torch.Tensor, torch.Tensor]
"""Activations [n, d_sae], reconstruction [n, d_out]."""

AGREEMENT = 1e-5
"""Largest difference of the float32 and float64 answers of a row, relative to its largest value (at least 1)."""


def write_expected(
    path: Path,
    *,
    description: dict[str, str],
    model: torch.nn.Module,
    answer: Callable[[torch.nn.Module, torch.Tensor], Answer],
    inputs: Inputs,
    ties: bool = False,
    others: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the float32 answer for `inputs`; leaves `model` in float64.

    description: `library`, `version`, `class`, `case`, `checkpoint` (relative to the file's folder) and whatever else
        a test needs to load it.
    ties: the architecture has to choose among equal pre-activations, and its choice is arbitrary.
    others: further tensors, such as what another library answers for the same checkpoint.
    Raises ValueError where float64 disagrees: an answer that rounding decides is no reference.
    """
    with torch.no_grad():
        activations, reconstruction = answer(model, inputs.x)
        precise = answer(model.to(torch.float64), inputs.x.double())
    metadata = {**description, "expects": "load", "rows": json.dumps(inputs.rows)}
    ambiguous = torch.zeros(len(inputs.x), dtype=torch.bool)
    if ties:
        for first, second in TIED:
            ambiguous |= (activations[:, first] - activations[:, second]).abs() > 1e-3
            ambiguous |= (precise[0][:, first] - precise[0][:, second]).abs() > 1e-3
        metadata |= {"ties": "arbitrary", "tied_features": json.dumps(TIED)}
        metadata["ambiguous_rows"] = json.dumps(ambiguous.nonzero().flatten().tolist())
        if not ambiguous.any():
            raise ValueError(f"{path}: no input puts a tie at the k-th place")
    clear = ~ambiguous
    if not torch.equal(activations[clear] != 0, precise[0][clear] != 0):
        raise ValueError(f"{path}: float32 and float64 activate different features")
    for ours, theirs in zip((activations, reconstruction), precise, strict=True):
        size = theirs.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
        error = ((ours.double() - theirs).abs() / size)[clear].max()
        if not error <= AGREEMENT:
            raise ValueError(f"{path}: float32 and float64 differ by {error:.1e}")
    tensors = {"x": inputs.x, "activations": activations, "reconstruction": reconstruction, **(others or {})}
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def write_refused(path: Path, *, description: dict[str, str], reason: str) -> None:
    """A checkpoint that a loader has to recognise and refuse: the description alone, no tensors."""
    save_file({}, path, metadata={**description, "expects": "refuse", "reason": reason})
