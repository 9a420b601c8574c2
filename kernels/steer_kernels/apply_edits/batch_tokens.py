"""Tokens of a batch in the torch path, and the rows of the bank that act on them."""

from __future__ import annotations

import numpy as np
import torch

from steer_kernels.apply_edits.edits import FloatArray, IntArray, SiteEdits


class Tokens:
    """Some tokens of the batch: a slice where they lie together, which costs no copy, else an index."""

    def __init__(self, tokens: IntArray, device: torch.device) -> None:
        first, last = int(tokens[0]), int(tokens[-1])
        self.index: torch.Tensor | slice
        if last - first == len(tokens) - 1 and bool((np.diff(tokens) == 1).all()):
            self.index = slice(first, last + 1)
        else:
            self.index = torch.from_numpy(tokens).to(device)

    def stream(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Their residual stream, float32."""
        part = self.of(hidden)
        if residual is None:
            return part.float()
        return torch.add(part.float(), self.of(residual).float())

    def add_to(self, total: torch.Tensor, delta: torch.Tensor) -> None:
        """Add delta [tokens, d_model] to their rows of `total`."""
        if isinstance(self.index, slice):
            total[self.index].add_(delta)
        else:
            total.index_add_(0, self.index, delta)

    def add_scaled(self, total: torch.Tensor, rows: torch.Tensor, coefficients: torch.Tensor) -> None:
        """Add coefficients [P] times rows [P, d_model] to their rows of `total`."""
        if isinstance(self.index, slice):
            total[self.index].addcmul_(rows, coefficients.unsqueeze(-1))
        else:
            total.index_add_(0, self.index, rows * coefficients.unsqueeze(-1))

    def assign(self, hidden: torch.Tensor, values: torch.Tensor) -> None:
        if isinstance(self.index, slice):
            hidden[self.index].copy_(values)
        else:
            hidden.index_copy_(0, self.index, values)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.index] if isinstance(self.index, slice) else tensor.index_select(0, self.index)


def one_row_a_token(edits: SiteEdits) -> SiteEdits:
    """The same edits with one row per (row, token)."""
    lengths = edits.stop - edits.start
    if bool((lengths == 1).all()):
        return edits
    row = np.repeat(np.arange(len(edits)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    expanded = edits.take(row)
    expanded.start[:] += offset
    expanded.stop[:] = expanded.start + 1
    return expanded


def gather(rows: torch.Tensor, index: IntArray) -> torch.Tensor:
    """Bank rows as float32, never a view: the bank may change hands before the table does."""
    return rows.index_select(0, torch.from_numpy(index).to(rows.device)).float()


def constant_of(edits: SiteEdits) -> FloatArray:
    """g(0): what a row writes that reads nothing."""
    return np.minimum(np.maximum(edits.shift, edits.low), edits.high)
