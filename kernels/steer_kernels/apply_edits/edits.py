"""What acts on one forward's tokens at one site."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

STREAM_LIMIT = 1e15
"""Edited values of `hidden` saturate here (or at half the largest value of its dtype, where that is less).

Edits compound from layer to layer, so finite requests could otherwise reach infinity, then NaN logits. Squares of the
limit, summed over d_model as norms do, stay finite in float32.
"""


def stream_limit(dtype: torch.dtype) -> float:
    return min(STREAM_LIMIT, torch.finfo(dtype).max / 2)


IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class TokenNorm(IntEnum):
    """How a token's stream x is scaled before it is read, and what is written is scaled back (SAELens `sae.py`).

    What is read is a(x) * x . read, and what is written is multiplied by s(x).
    NONE: a = s = 1.
    LAYER_NORM: s = std(x) with Bessel's correction, a = 1 / (s + 1e-5). Subtracting the mean is linear and part of the
        row that is read along.
    CONSTANT_NORM: s = ‖x‖ / sqrt(d_model), a = sqrt(d_model) / max(‖x‖, 1e-30).
    """

    NONE = 0
    LAYER_NORM = 1
    CONSTANT_NORM = 2


LAYER_NORM_EPS = 1e-5
SMALLEST_NORM = 1e-30
"""Streams shorter than this count as this long, so that a zero stream is read as zero."""


@dataclass(frozen=True)
class TopKEncoder:
    """A whole encoder, needed to decide which features of a token survive, by comparing them with each other.

    W_enc: [d_model, d_sae] and b_enc: [d_sae], both float32 on the model's device, with everything folded in:
    pre-activations are `a * x @ W_enc + b_enc`, a being that of the token norm of the rows that read through it. Where
    the row of each feature lies together in memory (W_enc is a view of [d_sae, d_model]), products are fastest.

    k: of each group, the k largest pre-activations survive; equal values are ranked by index (Gao et al. 2024).
    groups: the features are in so many consecutive groups of equal size.
    absolute: magnitudes are compared (AbsTopK).
    floor: the smallest threshold of a feature: pre-activations (or magnitudes) up to it are off whatever their rank.
    router: (W [d_model, groups], b [groups]), float32. Only the group with the largest `a * x @ W + b` survives, the
        first of equals, its activations times the softmax probability of that group (Mudide et al. 2024).
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    k: int
    groups: int = 1
    absolute: bool = False
    floor: float = float("-inf")
    router: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def group_size(self) -> int:
        return self.b_enc.shape[0] // self.groups

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.W_enc, self.b_enc, *(self.router or ())))


def group_probability(x: torch.Tensor, router: tuple[torch.Tensor, torch.Tensor], group: int) -> torch.Tensor:
    """[tokens]: the softmax probability of `group`, 0 where the router chooses another; x [tokens, d_model], scaled."""
    logits = torch.addmm(router[1], x, router[0])
    # argmax is the first of equals.
    return torch.where(logits.argmax(-1) == group, logits.softmax(-1)[:, group], 0.0)


@dataclass(frozen=True)
class SiteEdits:
    """E edit rows over the tokens of one forward, as parallel arrays of length E.

    start, stop: the tokens [start, stop) of the batch that the row acts on.
    read, write: rows of the bank. read = -1 means that nothing is read and f = 0.
    bias, threshold: f = p if p > threshold else 0, with p = a(x) * read . x + bias. ReLU has threshold 0, JumpReLU its
        own (Rajamanoharan et al. 2024: the value is p, not p - threshold), identity -inf.
    scale, shift, low, high: g(f) = clamp(scale * f + shift, low, high). `set` is (0, a), `add` (1, a), `min` low = a,
        `max` high = a, `scale` (c, 0), `ablate` (0, 0).
    encoder, feature: where encoder >= 0, f is zero unless `feature` survives in that encoder.
    norm: a TokenNorm, whose a scales what is read and whose s scales what is written.
    source: the site whose stream x is read, which an earlier op of the same forward sees; -1 for h, the stream that is
        edited.
    preserve_norm: after all rows are applied, h' is rescaled to the norm of h.
    gate: the number of the gate that the row goes through, -1 for none: it acts on those tokens where all conditions
        of the gate hold, and leaves the others to the bit as they are.

    Rows with write = -1 are the conditions. They read, and write nothing: one holds where f > low, or where scale is
    negative, where f <= low. `gate` is the one that it is a part of, start to stop has the tokens of all rows that go
    through that, and nothing else is looked at but what makes f.
    """

    start: IntArray
    stop: IntArray
    read: IntArray
    write: IntArray
    bias: FloatArray
    threshold: FloatArray
    scale: FloatArray
    shift: FloatArray
    low: FloatArray
    high: FloatArray
    encoder: IntArray
    feature: IntArray
    norm: IntArray
    source: IntArray
    preserve_norm: npt.NDArray[np.bool_]
    gate: IntArray

    def __len__(self) -> int:
        return len(self.start)

    @property
    def is_condition(self) -> npt.NDArray[np.bool_]:
        """[E] which rows are conditions."""
        return self.write < 0

    def take(self, index: IntArray | npt.NDArray[np.bool_]) -> SiteEdits:
        """The rows at `index` (positions or a mask), in that order."""
        return SiteEdits(*(getattr(self, field.name)[index] for field in fields(self)))

    def part(self, start: int, stop: int) -> SiteEdits:
        """Rows start to stop, as views."""
        return SiteEdits(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    @staticmethod
    def concatenate(parts: list[SiteEdits]) -> SiteEdits:
        return SiteEdits(
            *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(SiteEdits))
        )
