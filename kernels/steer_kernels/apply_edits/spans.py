"""Edits of many tokens in the torch path: small matrix products over a slice of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steer_kernels.apply_edits.activations import MEMBERSHIP_CHUNK, Response, Selector
from steer_kernels.apply_edits.batch_tokens import constant_of, gather
from steer_kernels.apply_edits.closed import Closed, Places
from steer_kernels.apply_edits.edits import SiteEdits, TokenNorm, TopKEncoder
from steer_kernels.apply_edits.token_norm import scaled


@dataclass(frozen=True)
class Span:
    """Rows on the same tokens [start, stop), of one kind.

    constant [d_model]: what those that read nothing add, together.
    """

    start: int
    stop: int
    constant: torch.Tensor | None
    reads: SpanReads | None

    @staticmethod
    def of(edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder], closed: Closed | None) -> Span:
        reading = edits.read >= 0
        constants, reads = edits.take(~reading), edits.take(reading)
        constant = None
        if len(constants):
            constant = torch.from_numpy(constant_of(constants)).to(rows.device) @ gather(rows, constants.write)
        return Span(
            start=int(edits.start[0]),
            stop=int(edits.stop[0]),
            constant=constant,
            reads=SpanReads.of(reads, rows, encoders, closed) if len(reads) else None,
        )

    def stream(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """That of its tokens, float32."""
        x = hidden[self.start : self.stop].float()
        return x if residual is None else x + residual[self.start : self.stop].float()


@dataclass(frozen=True)
class SpanReads:
    """n rows that read. read, write: [n, d_model] float32; conditions have none to write. selector: what decides
    whether their features survive. places: those of their gates.
    """

    read: torch.Tensor
    write: torch.Tensor
    bias: torch.Tensor
    response: Response
    norm: TokenNorm
    selector: Selector | None
    places: Places | None

    @staticmethod
    def of(
        edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder], closed: Closed | None = None
    ) -> SpanReads:
        encoder = int(edits.encoder[0])
        return SpanReads(
            read=gather(rows, edits.read),
            write=gather(rows, edits.write[~edits.is_condition]),
            bias=torch.from_numpy(edits.bias).to(rows.device),
            response=Response.of(edits, rows.device),
            norm=TokenNorm(int(edits.norm[0])),
            selector=None if encoder < 0 else Selector.of(encoders[encoder], edits.feature),
            places=Places.of(closed, edits.gate, np.arange(edits.start[0], edits.stop[0])[:, None]),
        )

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """f [tokens, n] of x [tokens, d_model], float32, scaled by the token norm."""
        pre = torch.addmm(self.bias, x, self.read.T)
        if self.selector is None:
            return self.response.activation(pre)
        f = torch.zeros_like(pre)
        # As for pairs: tokens on which no row can be on need no encode.
        undecided = self.response.may_be_on(pre).any(-1)
        probability = self.selector.probability(x)
        if probability is not None:
            undecided &= probability > 0
        for chunk in undecided.nonzero().squeeze(-1).split(MEMBERSHIP_CHUNK):
            kept = _topk(self.selector.pre_acts(x.index_select(0, chunk)), self.selector.k, self.selector.absolute)
            f[chunk] = self.response.activation(kept.index_select(1, self.selector.feature))
        return f if probability is None else f.mul_(probability.unsqueeze(-1))

    def coefficient(self, x: torch.Tensor) -> torch.Tensor:
        """What `write` is multiplied by, [tokens, n]; x [tokens, d_model] float32."""
        x, s = scaled(x, self.norm)
        return self.response.coefficient(self.activations(x), None if s is None else s.unsqueeze(-1))


def _topk(pre_acts: torch.Tensor, k: int, absolute: bool) -> torch.Tensor:
    """pre_acts [tokens, features] where they are among the k largest of their token, else 0; equal values go to the
    lower index. absolute: magnitudes are compared."""
    scores = pre_acts.abs() if absolute else pre_acts
    smallest = scores.topk(min(k, scores.shape[-1]), dim=-1).values[:, -1:]
    above, tied = scores > smallest, scores == smallest
    room = k - above.sum(-1, keepdim=True)
    return torch.where(above | (tied & (tied.cumsum(-1) <= room)), pre_acts, 0.0)
