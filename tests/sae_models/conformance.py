"""Checkpoints that published libraries wrote, with their own answers, and the comparison of ours with them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sae_models.token_norm import token_scales

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-5
"""Largest difference from the library's float32 answer, relative to the row's largest value (at least 1)."""


@dataclass(frozen=True)
class Expected:
    """activations [n, d_sae], reconstruction [n, d_out] for x [n, d_in]. clear: the rows in which no tie decides."""

    name: str
    checkpoint: Path
    metadata: dict[str, str]
    tensors: dict[str, torch.Tensor]

    @property
    def x(self):
        return self.tensors["x"]

    @property
    def clear(self):
        clear = torch.ones(len(self.x), dtype=torch.bool)
        clear[json.loads(self.metadata.get("ambiguous_rows", "[]"))] = False
        return clear


def read(case: Path) -> Expected:
    with safe_open(case / "expected.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Expected(case.name, case / metadata["checkpoint"], metadata, tensors)


def cases(family: str, expects: str = "load"):
    """The family's cases as pytest parameters."""
    found = [read(path.parent) for path in sorted((FIXTURES / family).glob("*/expected.safetensors"))]
    chosen = [case for case in found if case.metadata["expects"] == expects]
    assert chosen, f"no case of {family} expects {expects!r}"
    return [pytest.param(case, id=case.name) for case in chosen]


def assert_close(ours, theirs):
    size = theirs.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    assert float(((ours.double() - theirs.double()).abs() / size).max()) <= TOLERANCE


def assert_conforms(sae, expected):
    """The whole encoder and decoder, and every feature's own rows, give the library's answers."""
    x, clear = expected.x, expected.clear
    activations, reconstruction = expected.tensors["activations"], expected.tensors["reconstruction"]
    assert (sae.d_in, sae.d_sae, sae.d_out) == (x.shape[1], activations.shape[1], reconstruction.shape[1])
    ours = sae.encode(x)
    assert_close(ours[clear], activations[clear])
    assert torch.equal(ours[clear] != 0, activations[clear] != 0)
    assert_close(sae.decode(activations, x), reconstruction)
    if sae.selection is not None and not clear.all():
        # Where a tie decides, ours takes the lower index; what survives is as large.
        assert_close(ours[~clear].sort().values, activations[~clear].sort().values)
    a, _ = token_scales(x, sae.token_norm)
    for feature in range(sae.d_sae):
        rows = sae.rows(feature)
        pre = (a * (x @ rows.encoder).unsqueeze(-1)).squeeze(-1) + rows.bias
        on = activations[:, feature] != 0
        if sae.selection is None:
            f = torch.where(pre > rows.threshold, pre, 0.0)
            assert torch.equal(f != 0, on)
        elif not sae.selection.routed:
            f = torch.where(on, pre, 0.0)
            assert bool((pre[on] > rows.threshold).all())
        else:
            continue
        size = activations.abs().amax(dim=1).clamp(min=1.0)
        assert float(((f - activations[:, feature]).abs() / size)[clear].max()) <= TOLERANCE
        assert torch.allclose(rows.decoder, sae.decoder()[feature], atol=1e-6)
