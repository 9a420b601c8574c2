"""apply_edits on a CPU where each token has rows of its own, as in decoding: one pass over a token, compiled by Numba.

In torch operations such a step is a dozen calls on small tensors, each of which takes longer than its arithmetic and
goes over the stream once more. A call of this takes 2 us beside it, on one thread (benchmarks/results/kernels_cpu.csv).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from steer_kernels.apply_edits.batch_tokens import gather
from steer_kernels.apply_edits.edits import FloatArray, IntArray, SiteEdits, stream_limit

_ROWS, _INDEX, _NUMBERS = "float32[:, ::1]", "int64[::1]", "float32[::1]"
_SIGNATURE = (
    f"void({_ROWS}, {_ROWS}, boolean, {_INDEX}, {_INDEX}, {_INDEX}, {_ROWS}, {_ROWS}, {', '.join([_NUMBERS] * 6)}, "
    f"boolean[::1], float32, {_NUMBERS}, {_NUMBERS})"
)


# Sums may be taken in any order, so that they use the vector units; NaN and infinity stay what they are.
@njit(_SIGNATURE, fastmath={"reassoc", "contract"}, nogil=True)
def _edit_tokens(
    hidden, residual, has_residual, tokens, first, read_row, read, write,
    bias, threshold, scale, shift, low, high, preserve_norm, limit, coefficient, delta,
):  # fmt: skip
    """Edits first[i] to first[i + 1] act on token tokens[i]. Edit j reads along read[read_row[j]] where that is not -1.

    coefficient, delta: room for the edits of one token, and for a row.
    """
    d_model = hidden.shape[1]
    zero = np.float32(0)
    for i in range(len(tokens)):
        h = hidden[tokens[i]]
        r = residual[tokens[i]] if has_residual else h
        begin, end = first[i], first[i + 1]
        for j in range(begin, end):
            f = zero
            if read_row[j] >= 0:
                row = read[read_row[j]]
                p = zero
                if has_residual:
                    for c in range(d_model):
                        p += (h[c] + r[c]) * row[c]
                else:
                    for c in range(d_model):
                        p += h[c] * row[c]
                p += bias[j]
                if p > threshold[j]:
                    f = p
            g = scale[j] * f + shift[j]
            # Comparisons, where minimum and maximum would turn NaN into the bound.
            if g < low[j]:
                g = low[j]
            if g > high[j]:
                g = high[j]
            coefficient[j - begin] = g - f
        row, amount = write[begin], coefficient[0]
        for c in range(d_model):
            delta[c] = amount * row[c]
        for j in range(begin + 1, end):
            row, amount = write[j], coefficient[j - begin]
            for c in range(d_model):
                delta[c] += amount * row[c]
        if preserve_norm[i]:
            before, after = zero, zero
            for c in range(d_model):
                x = h[c] + r[c] if has_residual else h[c]
                before += x * x
                after += (x + delta[c]) * (x + delta[c])
            factor = np.float32(1)
            if after > zero:
                factor = np.sqrt(before) / np.sqrt(after)
            for c in range(d_model):
                x = h[c] + r[c] if has_residual else h[c]
                delta[c] = (x + delta[c]) * factor - x
        for c in range(d_model):
            new = h[c] + delta[c]
            if new > limit:
                new = limit
            if new < -limit:
                new = -limit
            h[c] = new if delta[c] != zero else h[c]


_LIMIT = np.float32(stream_limit(torch.float32))


@dataclass(frozen=True)
class TokenEdits:
    """Rows of float32 that read and write the same stream, each on one token, sorted by token.

    tokens [T], first [T + 1]: edits first[i] to first[i + 1] act on tokens[i]. read_row [E]: a row of `read`, -1 where
    nothing is read. read [R, d_model], write [E, d_model]: copied, since the bank may change hands before the table
    does. preserve_norm: [T].
    """

    tokens: IntArray
    first: IntArray
    read_row: IntArray
    read: FloatArray
    write: FloatArray
    bias: FloatArray
    threshold: FloatArray
    scale: FloatArray
    shift: FloatArray
    low: FloatArray
    high: FloatArray
    preserve_norm: npt.NDArray[np.bool_]
    coefficient: FloatArray
    delta: FloatArray

    @staticmethod
    def of(edits: SiteEdits, rows: torch.Tensor) -> TokenEdits:
        """edits: rows on one token each. rows: the bank."""
        edits = edits.take(np.argsort(edits.start, kind="stable"))
        tokens, first, count = np.unique(edits.start, return_index=True, return_counts=True)
        reads = edits.read >= 0
        return TokenEdits(
            tokens=tokens,
            first=np.append(first, len(edits)),
            read_row=np.where(reads, np.cumsum(reads) - 1, -1),
            read=gather(rows, edits.read[reads]).numpy(),
            write=gather(rows, edits.write).numpy(),
            bias=edits.bias,
            threshold=edits.threshold,
            scale=edits.scale,
            shift=edits.shift,
            low=edits.low,
            high=edits.high,
            preserve_norm=np.logical_or.reduceat(edits.preserve_norm, first),
            coefficient=np.empty(int(count.max()), dtype=np.float32),
            delta=np.empty(rows.shape[1], dtype=np.float32),
        )

    def apply(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Edit `hidden` [tokens, d_model] in place; both float32."""
        h = hidden.contiguous()
        rows = h.numpy()
        other = rows if residual is None else residual.contiguous().numpy()
        _edit_tokens(
            rows, other, residual is not None, self.tokens, self.first, self.read_row, self.read, self.write,
            self.bias, self.threshold, self.scale, self.shift, self.low, self.high, self.preserve_norm,
            _LIMIT, self.coefficient, self.delta,
        )  # fmt: skip
        if h is not hidden:
            hidden.copy_(h)
