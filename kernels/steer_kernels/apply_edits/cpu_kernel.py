"""apply_edits on a CPU, token by token, compiled by Numba: for float32 streams, and features that rank by themselves.

In torch operations a decode step is a dozen calls on small tensors, each of which takes longer than its arithmetic and
goes over the stream once more: 13 us where a call of this takes 2 (benchmarks/results/kernels_cpu.csv has ratios).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numba import njit

from steer_kernels.apply_edits.batch_tokens import gather, one_row_a_token
from steer_kernels.apply_edits.closed import Closed
from steer_kernels.apply_edits.edits import FloatArray, IntArray, SiteEdits, stream_limit

_ROWS, _INDEX, _NUMBERS = "float32[:, ::1]", "int64[::1]", "float32[::1]"
_SIGNATURE = (
    f"void({_ROWS}, {_ROWS}, boolean, {_INDEX}, {_INDEX}, {_ROWS}, {_INDEX}, {_INDEX}, {', '.join([_NUMBERS] * 6)}, "
    f"boolean[::1], {_INDEX}, {_NUMBERS}, float32, {_NUMBERS}, {_NUMBERS})"
)


# Sums may be taken in any order, so that they use the vector units; NaN and infinity stay what they are.
@njit(_SIGNATURE, fastmath={"reassoc", "contract"}, nogil=True)
def _edit_tokens(
    hidden, residual, has_residual, tokens, first, rows, read, write,
    bias, threshold, scale, shift, low, high, preserve_norm, place, failing, limit, coefficient, delta,
):  # fmt: skip
    """Edits first[i] to first[i + 1] act on token tokens[i]. Edit j reads along rows[read[j]], if that is not -1, and
    writes along rows[write[j]], where failing[place[j]] is 0.

    coefficient, delta: room for the edits of one token, and for a row.
    """
    d_model = hidden.shape[1]
    zero = np.float32(0)
    for i in range(len(tokens)):
        h = hidden[tokens[i]]
        r = residual[tokens[i]] if has_residual else h
        begin, end = first[i], first[i + 1]
        keeps_norm = False
        for j in range(begin, end):
            if failing[place[j]] > zero:
                coefficient[j - begin] = zero
                continue
            keeps_norm |= preserve_norm[j]
            f = zero
            if read[j] >= 0:
                row = rows[read[j]]
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
        row, amount = rows[write[begin]], coefficient[0]
        for c in range(d_model):
            delta[c] = amount * row[c]
        for j in range(begin + 1, end):
            row, amount = rows[write[j]], coefficient[j - begin]
            for c in range(d_model):
                delta[c] += amount * row[c]
        if keeps_norm:
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


_NO_GATES = np.zeros(1, dtype=np.float32)
_LIMIT = np.float32(stream_limit(torch.float32))


@dataclass(frozen=True)
class TokenEdits:
    """Edits of float32 streams that read and write the same one, each on one token, sorted by token.

    tokens [T], first [T + 1]: edits first[i] to first[i + 1] act on tokens[i]. rows [R, d_model]: copied, since the
    bank may change hands before the table does; `edits.read` and `edits.write` are numbers of these.
    place: where in failing each edit finds its gate, as `Closed` says.
    """

    edits: SiteEdits
    tokens: IntArray
    first: IntArray
    rows: FloatArray
    place: IntArray
    failing: FloatArray
    coefficient: FloatArray
    delta: FloatArray

    @staticmethod
    def of(edits: SiteEdits, bank: torch.Tensor, closed: Closed | None = None) -> TokenEdits:
        used, place = np.unique(np.concatenate([edits.read, edits.write]), return_inverse=True)
        # The first of those that are used is -1, where it is.
        place = place.reshape(2, -1) - int(used[0] < 0)
        edits = one_row_a_token(replace(edits, read=place[0], write=place[1]))
        edits = edits.take(np.argsort(edits.start, kind="stable"))
        tokens, first, count = np.unique(edits.start, return_index=True, return_counts=True)
        return TokenEdits(
            edits=edits,
            tokens=tokens,
            first=np.append(first, len(edits)),
            rows=gather(bank, used[used >= 0]).numpy(),
            place=np.zeros_like(edits.gate) if closed is None else closed.places(edits.gate, edits.start),
            failing=_NO_GATES if closed is None else closed.failing.numpy(),
            coefficient=np.empty(int(count.max()), dtype=np.float32),
            delta=np.empty(bank.shape[1], dtype=np.float32),
        )

    def apply(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Edit `hidden` [tokens, d_model] in place; both float32. Raises IndexError for tokens that are not there."""
        n_tokens, d_model = hidden.shape
        if self.tokens[-1] >= n_tokens or d_model != self.rows.shape[1]:
            raise IndexError(
                f"edits of tokens up to {self.tokens[-1]} and width {self.rows.shape[1]} in a stream of {n_tokens} "
                f"tokens and width {d_model}"
            )
        h = hidden.contiguous()
        stream = h.numpy()
        other = stream if residual is None else residual.contiguous().numpy()
        e = self.edits
        _edit_tokens(
            stream, other, residual is not None, self.tokens, self.first, self.rows, e.read, e.write, e.bias,
            e.threshold, e.scale, e.shift, e.low, e.high, e.preserve_norm, self.place, self.failing, _LIMIT,
            self.coefficient, self.delta,
        )  # fmt: skip
        if h is not hidden:
            hidden.copy_(h)
