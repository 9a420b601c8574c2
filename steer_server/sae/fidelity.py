"""How well an SAE stands in for the stream it reads: the numbers, and whether two ways to them agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table

from sae_models.features.evidence import SINK_NORM

CE_SCORE_TOLERANCE = 0.002
EXPLAINED_VARIANCE_TOLERANCE = 0.002
L0_TOLERANCE = 0.005
MIN_JACCARD = 0.99


class EvalError(ValueError):
    """A text, an SAE or a model with which fidelity cannot be measured."""


@dataclass(frozen=True)
class Observation:
    """What one path saw of one sequence of n tokens.

    x, xhat: the stream at the SAE's layer as it is and spliced, [n, d_model]. active: [n, d_sae] bool.
    loss_*: -log p of each token after the first, [n - 1]: clean, spliced, zeroed. kl_*: KL(clean || patched) of the
    next-token distributions, [n]. Nats.
    """

    x: torch.Tensor
    xhat: torch.Tensor
    active: torch.Tensor
    loss_clean: torch.Tensor
    loss_sae: torch.Tensor
    loss_zero: torch.Tensor
    kl_sae: torch.Tensor
    kl_zero: torch.Tensor

    def measured(self, skip_first: int) -> torch.Tensor:
        """[n] bool: tokens that the numbers about the SAE itself are over."""
        norms = self.x.double().norm(dim=-1)
        measured = norms <= SINK_NORM * norms[skip_first:].median()
        measured[:skip_first] = False
        return measured


@dataclass(frozen=True)
class Fidelity:
    """One path's numbers.

    tokens, sinks: counted, and left out for their norm. density: [d_sae], the share of `tokens` on which each feature
    is active. ce_*: mean next-token loss, kl_*: mean KL from the clean distribution, in nats, sinks included.
    """

    tokens: int
    sinks: int
    explained_variance: float
    l0: float
    ce_clean: float
    ce_sae: float
    ce_zero: float
    kl_sae: float
    kl_zero: float
    density: npt.NDArray[np.float64] = field(repr=False, compare=False)

    @property
    def ce_score(self) -> float:
        """(CE_zero - CE_sae) / (CE_zero - CE_clean): the loss recovered of what zero ablation costs."""
        return _ratio(self.ce_zero - self.ce_sae, self.ce_zero - self.ce_clean)

    @property
    def kl_score(self) -> float:
        """(KL_zero - KL_sae) / KL_zero."""
        return _ratio(self.kl_zero - self.kl_sae, self.kl_zero)

    @property
    def features_fired(self) -> int:
        return int((self.density > 0).sum())

    def as_json(self) -> dict[str, float | int]:
        return {name: getattr(self, name) for name in MEASURES}


MEASURES = {
    "explained_variance": ".4f",
    "ce_score": ".4f",
    "kl_score": ".4f",
    "l0": ".2f",
    "ce_clean": ".4f",
    "ce_sae": ".4f",
    "ce_zero": ".4f",
    "kl_sae": ".4f",
    "kl_zero": ".4f",
    "features_fired": "d",
    "tokens": "d",
    "sinks": "d",
}
"""What of Fidelity is reported, in this order, and how it is written."""


class FidelitySums:
    """Running sums of one path's observations, in float64."""

    def __init__(self, d_model: int, d_sae: int) -> None:
        self._tokens = 0
        self._sinks = 0
        self._error = 0.0
        self._square = 0.0
        self._x = torch.zeros(d_model, dtype=torch.float64)
        self._fired = torch.zeros(d_sae, dtype=torch.int64)
        self._losses = torch.zeros(3, dtype=torch.float64)
        self._predictions = 0
        self._kl = torch.zeros(2, dtype=torch.float64)
        self._distributions = 0

    def add(self, seen: Observation, skip_first: int) -> None:
        """skip_first: tokens at the start whose stream was left alone; nothing of them or predicted by them counts."""
        measured = seen.measured(skip_first)
        x, xhat = seen.x[measured].double(), seen.xhat[measured].double()
        self._tokens += len(x)
        self._sinks += len(measured) - skip_first - len(x)
        self._error += float((x - xhat).square().sum())
        self._square += float(x.square().sum())
        self._x += x.sum(0)
        self._fired += seen.active[measured].sum(0)
        losses = torch.stack([seen.loss_clean, seen.loss_sae, seen.loss_zero])[:, skip_first:]
        self._losses += losses.double().sum(1)
        self._predictions += losses.shape[1]
        kl = torch.stack([seen.kl_sae, seen.kl_zero])[:, skip_first:]
        self._kl += kl.double().sum(1)
        self._distributions += kl.shape[1]

    def fidelity(self) -> Fidelity:
        """Explained variance is 1 - E|x - xhat|^2 / (E|x|^2 - |E x|^2)."""
        variance = self._square / self._tokens - float((self._x / self._tokens).square().sum())
        ce_clean, ce_sae, ce_zero = (self._losses / self._predictions).tolist()
        kl_sae, kl_zero = (self._kl / self._distributions).tolist()
        return Fidelity(
            tokens=self._tokens,
            sinks=self._sinks,
            explained_variance=1.0 - _ratio(self._error / self._tokens, variance),
            l0=int(self._fired.sum()) / self._tokens,
            ce_clean=ce_clean,
            ce_sae=ce_sae,
            ce_zero=ce_zero,
            kl_sae=kl_sae,
            kl_zero=kl_zero,
            density=(self._fired.double() / self._tokens).numpy(),
        )


@dataclass(frozen=True)
class FidelityReport:
    """served: through vLLM and this project's kernels. reference: through Hugging Face in fp32, independently.

    jaccard: mean over tokens of |A & B| / |A | B| for the two sets of active features.
    """

    sae: str
    model: str
    hook_point: str
    sequences: int
    served: Fidelity
    reference: Fidelity
    jaccard: float

    @property
    def disagreements(self) -> tuple[str, ...]:
        """What the two paths do not agree in, with the bound. Not-a-number agrees with nothing."""
        served, reference = self.served, self.reference
        ce = abs(served.ce_score - reference.ce_score)
        variance = abs(served.explained_variance - reference.explained_variance)
        l0 = abs(served.l0 - reference.l0) / reference.l0 if reference.l0 else abs(served.l0)
        checks = [
            (ce <= CE_SCORE_TOLERANCE, f"CE score: off by {ce:.4f}, {CE_SCORE_TOLERANCE} allowed"),
            (
                variance <= EXPLAINED_VARIANCE_TOLERANCE,
                f"explained variance: off by {variance:.4f}, {EXPLAINED_VARIANCE_TOLERANCE} allowed",
            ),
            (l0 <= L0_TOLERANCE, f"L0: off by {l0:.2%}, {L0_TOLERANCE:.1%} allowed"),
            (self.jaccard > MIN_JACCARD, f"active features: Jaccard {self.jaccard:.4f}, over {MIN_JACCARD} needed"),
        ]
        return tuple(message for holds, message in checks if not holds)

    @property
    def agrees(self) -> bool:
        return not self.disagreements

    def as_json(self) -> dict[str, Any]:
        return {
            "sae": self.sae,
            "model": self.model,
            "hook_point": self.hook_point,
            "sequences": self.sequences,
            "served": self.served.as_json(),
            "reference": self.reference.as_json(),
            "jaccard": self.jaccard,
            "agrees": self.agrees,
            "disagreements": list(self.disagreements),
        }

    def as_table(self) -> Table:
        verdict = "the two paths agree" if self.agrees else f"DISAGREE: {'; '.join(self.disagreements)}"
        table = Table(
            "",
            "served",
            "reference",
            "difference",
            title=f"{self.sae} at {self.hook_point} of {self.model}",
            caption=f"{self.sequences} sequences, Jaccard of active features {self.jaccard:.5f}: {verdict}",
        )
        for name, form in MEASURES.items():
            served, reference = getattr(self.served, name), getattr(self.reference, name)
            difference = format(served - reference, f"+{form}" if form == "d" else "+.1e")
            table.add_row(name.replace("_", " "), format(served, form), format(reference, form), difference)
        return table


def jaccard(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|A & B| / |A | B| of the sets in each row of a, b [tokens, d_sae] bool: [tokens] float64; 1 for empty sets."""
    common, either = (a & b).sum(-1), (a | b).sum(-1)
    return torch.where(either > 0, common.double() / either.clamp(min=1), 1.0)


def kl_divergence(logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, [n], of distributions in rows of log-probabilities [n, vocab]."""
    return (logprobs.exp() * (logprobs - other)).sum(-1)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
