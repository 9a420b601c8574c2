"""What a family's own library answered for a checkpoint, and how ours is held against it."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from sae_models.sae import SAE
from sae_models.tensor_source import LoadedTensors
from sae_models.token_norm import token_scales

FIXTURES = Path(__file__).parent.parent / "fixtures"

TOLERANCE = 1e-5
"""Largest difference, relative to a row's largest value (at least 1): float32 on both sides, summed in other orders."""


@dataclass(frozen=True)
class Expected:
    """notes: the metadata. x [n, d_in], activations [n, d_sae], reconstruction [n, d_out], and what else was saved."""

    notes: dict[str, str]
    tensors: dict[str, torch.Tensor]

    @property
    def x(self) -> torch.Tensor:
        return self.tensors["x"]

    @property
    def activations(self) -> torch.Tensor:
        """Those of the library; of two tied features of which it took one, the lower has it, as ours takes it."""
        found = self.tensors["activations"].clone()
        for lower, higher in json.loads(self.notes.get("tied_features", "[]")):
            alone = (found[:, lower] == 0) & (found[:, higher] != 0)
            found[alone, lower], found[alone, higher] = found[alone, higher], 0.0
        return found

    @property
    def unambiguous(self) -> torch.Tensor:
        """Rows in which no tie had to be broken, bool."""
        clear = torch.ones(len(self.x), dtype=torch.bool)
        clear[json.loads(self.notes.get("ambiguous_rows", "[]"))] = False
        return clear


def expected(path: Path) -> Expected:
    with safe_open(path, framework="pt") as file:
        return Expected(file.metadata(), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def open_pickle(path: Path) -> LoadedTensors:
    """Tensors of a pickled state dict, as the process of `sae convert` reads them."""
    return LoadedTensors(path, torch.load(path, weights_only=True))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    size = theirs.double().abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
    error = ((ours.double() - theirs.double()).abs() / size).max()
    assert error <= TOLERANCE, f"largest relative difference {error:.1e}"


def assert_same_answers(sae: SAE, answers: Expected) -> None:
    """Activations, reconstructions and the rows of every feature, in float32 and float64."""
    for x in (answers.x, answers.x.double()):
        ours = sae.encode(x)
        assert torch.equal(ours != 0, answers.activations != 0)
        assert_close(ours, answers.activations)
        assert_close(sae.decode(answers.tensors["activations"].to(x), x), answers.tensors["reconstruction"])
        clear = answers.unambiguous
        assert_close(sae.decode(ours, x)[clear], answers.tensors["reconstruction"][clear])
    assert_rows(sae, answers)


def assert_rows(sae: SAE, answers: Expected) -> None:
    """A feature's rows alone give its activation, and what it writes."""
    x = answers.x.double()
    a, s = token_scales(x, sae.token_norm)
    pre_acts, nothing = torch.empty(len(x), sae.d_sae, dtype=torch.float64), torch.zeros(len(x), sae.d_sae).double()
    without = sae.decode(nothing, x)
    for feature in range(sae.d_sae):
        rows = sae.rows(feature)
        pre = a.squeeze(-1) * (x @ rows.encoder.double()) + rows.bias
        pre_acts[:, feature] = torch.where(pre > rows.threshold, pre, 0.0)
        one = nothing.clone()
        one[:, feature] = 1.0
        assert_close(sae.decode(one, x) - without, s * rows.decoder.double())
    chosen = answers.activations != 0 if sae.selection is not None else torch.ones_like(pre_acts, dtype=torch.bool)
    if sae.selection is not None and sae.selection.routed:
        W, b = sae.router()
        pre_acts *= sae.selection.route(x @ W.double() + b).repeat_interleave(sae.d_sae // sae.selection.groups, -1)
    assert_close(torch.where(chosen, pre_acts, 0.0), answers.activations)
