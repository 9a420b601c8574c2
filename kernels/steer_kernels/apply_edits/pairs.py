"""Edits of few tokens in the torch path: rows beside each other, each with its token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steer_kernels.apply_edits.activations import MEMBERSHIP_CHUNK, Response, Selector
from steer_kernels.apply_edits.batch_tokens import Tokens, constant_of, gather
from steer_kernels.apply_edits.closed import Closed, Places
from steer_kernels.apply_edits.edits import SiteEdits, TokenNorm, TopKEncoder
from steer_kernels.count_above.torch_path import features_ahead


@dataclass(frozen=True)
class ConstantPairs:
    """Rows that read nothing, each on one token. delta [P, d_model]: what they add."""

    tokens: Tokens
    delta: torch.Tensor

    @staticmethod
    def of(edits: SiteEdits, rows: torch.Tensor) -> ConstantPairs:
        constant = torch.from_numpy(constant_of(edits)).to(rows.device)
        return ConstantPairs(Tokens(edits.start, rows.device), gather(rows, edits.write).mul_(constant.unsqueeze(-1)))


@dataclass(frozen=True)
class ReadPairs:
    """P rows that read, each on one token. read, write: [P, d_model] float32; conditions have none to write.

    places: those of their gates.
    """

    tokens: Tokens
    read: torch.Tensor
    write: torch.Tensor
    bias: torch.Tensor
    response: Response
    norm: TokenNorm
    places: Places | None

    @staticmethod
    def of(edits: SiteEdits, rows: torch.Tensor, closed: Closed | None) -> ReadPairs:
        return ReadPairs(
            tokens=Tokens(edits.start, rows.device),
            read=gather(rows, edits.read),
            write=gather(rows, edits.write[~edits.is_condition]),
            bias=torch.from_numpy(edits.bias).to(rows.device),
            response=Response.of(edits, rows.device),
            norm=TokenNorm(int(edits.norm[0])),
            places=Places.of(closed, edits.gate, edits.start),
        )

    def pre_acts(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vecdot(x, self.read).add_(self.bias)


@dataclass(frozen=True)
class MemberPairs:
    """Rows that read through one group of an encoder, each on one token. slot: its place among the distinct ones."""

    pairs: ReadPairs
    selector: Selector
    distinct: Tokens
    slot: torch.Tensor

    @staticmethod
    def of(edits: SiteEdits, rows: torch.Tensor, encoders: Sequence[TopKEncoder], closed: Closed | None) -> MemberPairs:
        tokens, slot = np.unique(edits.start, return_inverse=True)
        return MemberPairs(
            pairs=ReadPairs.of(edits, rows, closed),
            selector=Selector.of(encoders[int(edits.encoder[0])], edits.feature),
            distinct=Tokens(tokens, rows.device),
            slot=torch.from_numpy(slot.astype(np.int64)).to(rows.device),
        )

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """f [P]; x [distinct tokens, d_model] is the stream that they read, scaled."""
        pairs, selector = self.pairs, self.selector
        f = torch.zeros_like(pairs.bias)
        # A feature at or below its threshold is off whatever the others are: most need no encode.
        undecided = pairs.response.may_be_on(pairs.pre_acts(x.index_select(0, self.slot)))
        probability = selector.probability(x)
        if probability is not None:
            probability = probability.index_select(0, self.slot)
            undecided &= probability > 0
        for chunk in undecided.nonzero().squeeze(-1).split(MEMBERSHIP_CHUNK):
            slots, inverse = torch.unique(self.slot[chunk], return_inverse=True)
            all_pre = selector.pre_acts(x.index_select(0, slots)).index_select(0, inverse)
            feature = selector.feature[chunk].unsqueeze(-1)
            pre = all_pre.gather(1, feature)
            ahead = features_ahead(all_pre.abs() if selector.absolute else all_pre, feature).squeeze(-1)
            f[chunk] = torch.where(ahead < selector.k, pairs.response.activation(pre.squeeze(-1), chunk), 0.0)
        return f if probability is None else f.mul_(probability)
