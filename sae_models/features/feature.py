"""What is known of one feature of an SAE: a label, and the evidence behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LabelSource = Literal["read", "imported", "automatic"]
"""read: written by someone who read the evidence. imported: from another collection. automatic: its top tokens."""

QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.99)
"""Which quantiles of a feature's positive activations are kept."""


@dataclass(frozen=True)
class TokenScore:
    """A token of the model's vocabulary as text, and a score of it; what the score is depends on where it stands."""

    token: str
    score: float


@dataclass(frozen=True)
class Context:
    """A place where a feature was strongly active (MaxAct).

    tokens: a window of text around it. activations: of the feature, one for each token. peak: index of the largest.
    span: tokens [start, end) of the window, the shortest text ending at the peak that alone brings the activation to
    nearly what it was; None where no shorter one does or none was looked for.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Feature:
    """A feature and its evidence.

    density: share of tokens on which it is active. max_activation: largest activation seen, in raw units. quantiles:
    of its positive activations, one for each of QUANTILES; empty where it was never active. decoder_norm: of its
    decoder row, so that activation times norm is its part of the residual stream. raised, lowered: the tokens whose
    logits the decoder row raises and lowers most (VocabProj). informative: tokens by the mutual information, in bits,
    between being that token and the feature being active there, only those on which it is more active than elsewhere.
    contexts: strongest first. A number is None where an import does not tell it.
    """

    index: int
    density: float | None
    max_activation: float | None
    decoder_norm: float | None
    quantiles: tuple[float, ...] = ()
    raised: tuple[TokenScore, ...] = ()
    lowered: tuple[TokenScore, ...] = ()
    informative: tuple[TokenScore, ...] = ()
    contexts: tuple[Context, ...] = ()
    label: str = ""
    label_source: LabelSource = "automatic"


@dataclass(frozen=True)
class Evidence:
    """What the evidence of an SAE's features was taken from.

    sae_sha256: of the SAE as `SAE.sha256`. tokens: how many were read, those that the SAE skips left out.
    mean_residual_norm: of the residual stream at the SAE's hook point over those tokens. sources: what the text was,
    with its licence.
    """

    sae_name: str
    sae_sha256: str
    model_name: str
    layer: int
    d_sae: int
    tokens: int
    mean_residual_norm: float
    sources: tuple[str, ...] = field(default=())
