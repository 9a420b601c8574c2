"""Which features of a step table's edits survive among those of their SAE: TopK membership by count."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steer_kernels.apply_edits.edits import group_probability
from steer_kernels.apply_edits.record_words import ENCODER, FEATURE, NORM, READ_ORDER, START, STOP, WORDS
from steer_kernels.apply_edits.step_table import MAX_RANKED, StepTable
from steer_kernels.apply_edits.token_norm import scaled
from steer_kernels.count_above import count_above

EDITS = 16
"""Edits that a program looks at together."""


@triton.jit(
    do_not_specialize=["site", "group_offsets", "asked_stride", "encoder", "norm", "first_feature", "last_feature"]
)
def _asked_features(
    group_ptr,
    first_write_ptr,
    first_read_ptr,
    table_ptr,
    asked_ptr,
    site,
    group_offsets,
    asked_stride,
    encoder,
    norm,
    first_feature,
    last_feature,
    EDITS: tl.constexpr,
):
    """The features, counted from first_feature, that a token's edits ask of one group of an encoder: asked [tokens,
    asked_stride], -1 where an edit asks for none."""
    token = tl.program_id(0)
    asked = asked_ptr + token.to(tl.int64) * asked_stride
    for first in range(0, asked_stride, EDITS):
        at = first + tl.arange(0, EDITS)
        tl.store(asked + at, tl.full([EDITS], -1, dtype=tl.int32), mask=at < asked_stride)
    # Other threads of this program wrote what some of the next stores overwrite.
    tl.debug_barrier()
    group = tl.load(group_ptr + token)
    if group < 0:
        return
    base = tl.load(first_write_ptr + group * group_offsets)
    begin = tl.load(first_read_ptr + group * group_offsets + site)
    end = tl.load(first_read_ptr + group * group_offsets + site + 1)
    for first in range(begin, end, EDITS):
        place = first + tl.arange(0, EDITS)
        exists = place < end
        edit = tl.load(table_ptr + place * WORDS + READ_ORDER, mask=exists, other=0)
        record = table_ptr + edit * WORDS
        asks = (tl.load(record + ENCODER, mask=exists, other=-1) == encoder) & exists
        asks &= tl.load(record + NORM, mask=exists, other=0) == norm
        asks &= tl.load(record + START, mask=exists, other=0) <= token
        asks &= tl.load(record + STOP, mask=exists, other=0) > token
        feature = tl.load(record + FEATURE, mask=exists, other=-1)
        asks &= (feature >= first_feature) & (feature <= last_feature)
        tl.store(asked + edit - base, feature - first_feature, mask=asks)


@triton.jit(do_not_specialize=["asked_stride", "n_asked", "k", "held_stride"])
def _keep_ranks(
    asked_ptr,
    p_ptr,
    ahead_ptr,
    probability_ptr,
    pre_act_ptr,
    survival_ptr,
    asked_stride,
    n_asked,
    k,
    held_stride,
    HAS_PROBABILITY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of n_asked features of a token, those that are asked for: p, and what the activation is multiplied by, where the
    edits look for them."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, COLUMNS)
    asked = tl.load(asked_ptr + token * asked_stride + at, mask=at < n_asked, other=-1) >= 0
    survives = tl.load(ahead_ptr + token * n_asked + at, mask=asked, other=0) < k
    survival = survives.to(tl.float32)
    if HAS_PROBABILITY:
        survival *= tl.load(probability_ptr + token)
    tl.store(pre_act_ptr + token * held_stride + at, tl.load(p_ptr + token * n_asked + at, mask=asked), mask=asked)
    tl.store(survival_ptr + token * held_stride + at, survival, mask=asked)


def rank(hidden: torch.Tensor, residual: torch.Tensor | None, table: StepTable, site: int) -> None:
    """Find `table.pre_acts` and `table.survival` of the edits that read at `site` through an encoder."""
    rankings = table.rankings.get(site, [])
    if not rankings:
        return
    n_tokens = min(len(hidden), table.held_tokens)
    stream = hidden[:n_tokens].float()
    if residual is not None:
        # Never in place: of a float32 stream, `stream` is a view.
        stream = stream + residual[:n_tokens].float()
    for ranking in rankings:
        encoder = table.encoders[ranking.encoder]
        first = ranking.group * encoder.group_size
        features = slice(first, first + encoder.group_size)
        asked = torch.empty(n_tokens, table.columns, dtype=torch.int32, device=hidden.device)
        _asked_features[(n_tokens,)](
            table.token_group, table.first_write, table.first_read, table.records, asked, site, table.group_offsets,
            table.columns, ranking.encoder, int(ranking.norm), first, features.stop - 1, EDITS=EDITS, num_warps=1,
        )  # fmt: skip
        x, _ = scaled(stream, ranking.norm)
        W_enc, b_enc = encoder.W_enc.T[features], encoder.b_enc[features]
        probability = None
        if encoder.router is not None:
            probability = group_probability(x, encoder.router, ranking.group)
        # Of a request's other edits nothing is asked: columns of them alone cost a launch.
        for start in range(0, table.columns, MAX_RANKED):
            part = asked[:, start : start + MAX_RANKED]
            p, ahead = count_above(x, W_enc, b_enc, part, encoder.floor, encoder.absolute, None)
            _keep_ranks[(n_tokens,)](
                part, p, ahead, p if probability is None else probability, table.pre_acts[start:],
                table.survival[start:], asked.stride(0), part.shape[1], encoder.k, table.stride,
                HAS_PROBABILITY=probability is not None, COLUMNS=MAX_RANKED, num_warps=1,
            )  # fmt: skip
