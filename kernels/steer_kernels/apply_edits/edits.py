"""What acts on one forward's tokens at one site."""

from __future__ import annotations

from dataclasses import dataclass, fields

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


@dataclass(frozen=True)
class TopKEncoder:
    """A whole encoder, needed to decide which features are among a token's k largest.

    W_enc: [d_model, d_sae] and b_enc: [d_sae], both float32 on the model's device, with everything folded in:
    pre-activations are `h @ W_enc + b_enc`.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    k: int


@dataclass(frozen=True)
class SiteEdits:
    """E edit rows over the tokens of one forward, as parallel arrays of length E.

    start, stop: the tokens [start, stop) of the batch that the row acts on.
    read, write: rows of the bank. read = -1 means that nothing is read and f = 0.
    bias, threshold: f = p if p > threshold else 0, with p = read . h + bias. ReLU has threshold 0, JumpReLU its own
        (Rajamanoharan et al. 2024: the value is p, not p - threshold), identity -inf.
    scale, shift, low, high: g(f) = clamp(scale * f + shift, low, high). `set` is (0, a), `add` (1, a), `min` low = a,
        `max` high = a, `scale` (c, 0), `ablate` (0, 0).
    encoder, feature: where encoder >= 0, f is zero unless `feature` is among the k largest pre-activations of that
        encoder, equal values ranked by index (Gao et al. 2024).
    preserve_norm: after all rows are applied, h' is rescaled to the norm of h.
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
    preserve_norm: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.start)

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
