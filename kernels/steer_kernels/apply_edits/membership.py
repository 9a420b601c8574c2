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


@triton.jit(do_not_specialize=["site", "n_sites", "asked_stride", "encoder", "norm", "first_feature", "last_feature"])
def _asked_features(
    group_ptr,
    first_write_ptr,
    first_read_ptr,
    table_ptr,
    asked_ptr,
    site,
    n_sites,
    asked_stride,
    encoder,
    norm,
    first_feature,
    last_feature,
    EDITS: tl.constexpr,
):
    """The features, counted from first_feature, that a token's edits ask of one group of an encoder."""
    token = tl.program_id(0)
    group = tl.load(group_ptr + token)
    if group < 0:
        return
    base = tl.load(first_write_ptr + group * n_sites)
    begin = tl.load(first_read_ptr + group * n_sites + site)
    end = tl.load(first_read_ptr + group * n_sites + site + 1)
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
        tl.store(asked_ptr + token.to(tl.int64) * asked_stride + edit - base, feature - first_feature, mask=asks)


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
    held = (n_tokens, table.stride)
    pre_acts, survival = (buffer[: n_tokens * table.stride].view(held) for buffer in (table.pre_acts, table.survival))
    for ranking in rankings:
        encoder = table.encoders[ranking.encoder]
        first = ranking.group * encoder.group_size
        features = slice(first, first + encoder.group_size)
        asked = torch.full((n_tokens, table.columns), -1, dtype=torch.int32, device=hidden.device)
        _asked_features[(n_tokens,)](
            table.token_group, table.first_write, table.first_read, table.records, asked, site, table.n_sites,
            table.columns, ranking.encoder, int(ranking.norm), first, features.stop - 1, EDITS=EDITS, num_warps=1,
        )  # fmt: skip
        x, _ = scaled(stream, ranking.norm)
        W_enc, b_enc = encoder.W_enc.T[features], encoder.b_enc[features]
        probability = None
        if encoder.router is not None:
            probability = group_probability(x, encoder.router, ranking.group).unsqueeze(-1)
        # Of a request's other edits nothing is asked: columns of them alone cost a launch.
        for start in range(0, table.columns, MAX_RANKED):
            columns = slice(start, min(start + MAX_RANKED, table.columns))
            wanted = asked[:, columns]
            p, ahead = count_above(x, W_enc, b_enc, wanted, encoder.floor, encoder.absolute, None)
            alive = (ahead < encoder.k).float()
            if probability is not None:
                alive *= probability
            pre_acts[:, columns] = torch.where(wanted >= 0, p, pre_acts[:, columns])
            survival[:, columns] = torch.where(wanted >= 0, alive, survival[:, columns])
