"""apply_edits on a GPU: one launch a site, whose programs find their tokens' edits in a `StepTable`.

A program reads first: the coefficient s * (g(f) - f) of every edit that reads at this site goes to the table's
coefficients, and of every condition, whether it holds. Then it writes: the rows of the edits that write at this site,
times the coefficients that were left here or at an earlier site, are added to `hidden`, but for edits of which a
condition does not hold. A program whose tokens have nothing to do returns after two loads.

There are two forms of the same code. In the row form a program has one token. In the grouped form it has a block of
consecutive tokens of one request, which share their edits: a row of the bank is then read once for all of them, and
products go to the matrix units. Blocks of mixed tokens are left to the row form, so that a batch of any composition
takes the same launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steer_kernels.apply_edits.edits import LAYER_NORM_EPS, SMALLEST_NORM, TokenNorm, stream_limit
from steer_kernels.apply_edits.membership import rank
from steer_kernels.apply_edits.record_words import (
    ENCODER,
    FLOATS,
    GATE,
    GATE_COUNT,
    NORM,
    PRESERVE_NORM,
    READ,
    READ_ORDER,
    START,
    STOP,
    WORDS,
    WRITE,
)
from steer_kernels.apply_edits.step_table import StepTable
from steer_kernels.encoder_tile import INTERPRETED
from steer_kernels.triton_target import triton_backend

BLOCK = 32
"""Tokens of a program in the grouped form."""
GROUPED_FROM = 256
"""Tokens of a forward from which on the grouped form is launched too, if a group has a block of them at all: decode,
where each has one, pays one launch."""

_LAYER_NORM = tl.constexpr(int(TokenNorm.LAYER_NORM))
_CONSTANT_NORM = tl.constexpr(int(TokenNorm.CONSTANT_NORM))
_LAYER_NORM_EPS = tl.constexpr(LAYER_NORM_EPS)
_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)


@triton.jit
def _is_one_group(group_ptr, tokens, n_tokens):
    """Whether `tokens`, a block of the grouped form, all exist and are of one group."""
    groups = tl.load(group_ptr + tokens, mask=tokens < n_tokens, other=-1)
    first = tl.min(groups, axis=0)
    return (first >= 0) & (first == tl.max(groups, axis=0))


@triton.jit
def _stream(hidden_rows, residual_rows, at, inside, HAS_RESIDUAL: tl.constexpr):
    """x [TOKENS, COLUMNS] float32 of a program's tokens."""
    x = tl.load(hidden_rows + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_rows + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit
def _products(x, rows, PRECISION: tl.constexpr):
    """x [TOKENS, COLUMNS] times rows [EDITS, COLUMNS], float32 [TOKENS, EDITS]."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # Triton 3.9's interpreter multiplies the bit patterns of bfloat16.
        x, rows = x.to(tl.float32), rows.to(tl.float32)
    return tl.dot(x, tl.trans(rows), input_precision=PRECISION)


@triton.jit
def _delta(
    bank_ptr, table_ptr, coefficient_rows, begin, end, base, at, inside, bank_stride,
    GROUPED: tl.constexpr, TOKENS: tl.constexpr, EDITS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the edits begin to end add to the columns `at`, float32 [TOKENS, COLUMNS]."""
    total = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
    for first in range(begin, end, EDITS):
        edit = first + tl.arange(0, EDITS)
        exists = edit < end
        write = tl.load(table_ptr + edit * WORDS + WRITE, mask=exists, other=0)
        rows_at = bank_ptr + write.to(tl.int64)[:, None] * bank_stride + at[None, :]
        rows = tl.load(rows_at, mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
        coefficient = tl.load(coefficient_rows + (edit - base)[None, :], mask=exists[None, :], other=0.0)
        if GROUPED:
            total = tl.dot(coefficient, rows, total, input_precision=PRECISION)
        else:
            # One token: coefficient [1, EDITS].
            total += tl.sum(tl.trans(coefficient) * rows, axis=0)[None, :]
    return total


# What changes from step to step must not compile another kernel in the middle of serving.
@triton.jit(do_not_specialize=["site", "group_offsets", "n_tokens", "coefficient_stride"])
def _apply_edits(
    hidden_ptr,
    residual_ptr,
    bank_ptr,
    group_ptr,
    first_write_ptr,
    first_read_ptr,
    table_ptr,
    coefficient_ptr,
    pre_act_ptr,
    survival_ptr,
    edited_ptr,
    site,
    group_offsets,
    n_tokens,
    d_model,
    hidden_stride,
    residual_stride,
    bank_stride,
    coefficient_stride,
    limit,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RANKED: tl.constexpr,
    GROUPED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    EDITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """TOKENS is 1 in the row form; BLOCK is that of the grouped form beside it, 0 where it is not launched."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if GROUPED:
        if not _is_one_group(group_ptr, tokens, n_tokens):
            return
    elif BLOCK > 0:  # noqa: SIM102 - the condition is the compiler's, what follows is not
        if _is_one_group(group_ptr, tl.program_id(0) // BLOCK * BLOCK + tl.arange(0, BLOCK), n_tokens):
            return
    group = tl.load(group_ptr + tl.program_id(0) * TOKENS)
    if group < 0:
        return
    first_write = first_write_ptr + group * group_offsets
    first_read = first_read_ptr + group * group_offsets + site
    base = tl.load(first_write)
    begin, end = tl.load(first_write + site + 1), tl.load(first_write + site + 2)
    read_begin, read_end = tl.load(first_read), tl.load(first_read + 1)
    if (begin == end) & (read_begin == read_end):
        return

    at_token = tokens.to(tl.int64)[:, None]
    hidden_rows = hidden_ptr + at_token * hidden_stride
    residual_rows = residual_ptr + at_token * residual_stride
    coefficient_rows = coefficient_ptr + at_token * coefficient_stride
    column = tl.arange(0, COLUMNS)

    for first in range(read_begin, read_end, EDITS):
        place = first + tl.arange(0, EDITS)
        exists = place < read_end
        edit = tl.load(table_ptr + place * WORDS + READ_ORDER, mask=exists, other=0)
        record = table_ptr + edit * WORDS
        start = tl.load(record + START, mask=exists, other=0)
        stop = tl.load(record + STOP, mask=exists, other=0)
        read = tl.load(record + READ, mask=exists, other=-1)
        is_condition = tl.load(record + WRITE, mask=exists, other=0) < 0
        norm = tl.load(record + NORM, mask=exists, other=0)
        acts = (tokens[:, None] >= start[None, :]) & (tokens[:, None] < stop[None, :])
        reads = read >= 0
        bank_rows = bank_ptr + read.to(tl.int64)[:, None] * bank_stride
        products = tl.zeros([TOKENS, EDITS], dtype=tl.float32)
        sums = tl.zeros([TOKENS], dtype=tl.float32)
        squares = tl.zeros([TOKENS], dtype=tl.float32)
        if tl.max(reads.to(tl.int32), axis=0) == 1:
            for column_start in range(0, d_model, COLUMNS):
                at = column_start + column
                inside = at < d_model
                rows = tl.load(bank_rows + at[None, :], mask=reads[:, None] & inside[None, :], other=0.0)
                if GROUPED:
                    # The two parts of the stream are multiplied each in its own dtype, so that nothing is rounded.
                    hidden = tl.load(hidden_rows + at[None, :], mask=inside[None, :], other=0.0)
                    products += _products(hidden, rows, PRECISION)
                    if HAS_RESIDUAL:
                        residual = tl.load(residual_rows + at[None, :], mask=inside[None, :], other=0.0)
                        products += _products(residual, rows, PRECISION)
                else:
                    x = _stream(hidden_rows, residual_rows, at, inside, HAS_RESIDUAL)
                    products += tl.sum(rows.to(tl.float32) * x, axis=1)[None, :]
        read_scale = tl.full([TOKENS, EDITS], 1.0, dtype=tl.float32)
        write_scale = tl.full([TOKENS, EDITS], 1.0, dtype=tl.float32)
        if tl.max(norm, axis=0) > 0:
            for column_start in range(0, d_model, COLUMNS):
                at = column_start + column
                x = _stream(hidden_rows, residual_rows, at, at < d_model, HAS_RESIDUAL)
                sums += tl.sum(x, axis=1)
                squares += tl.sum(x * x, axis=1)
            mean = sums / d_model
            centred = tl.zeros([TOKENS], dtype=tl.float32)
            for column_start in range(0, d_model, COLUMNS):
                at = column_start + column
                x = _stream(hidden_rows, residual_rows, at, at < d_model, HAS_RESIDUAL)
                x = tl.where((at < d_model)[None, :], x - mean[:, None], 0.0)
                centred += tl.sum(x * x, axis=1)
            std = tl.sqrt(centred / tl.maximum(d_model - 1, 1))
            root = tl.sqrt(d_model.to(tl.float32))
            length = tl.sqrt(squares)
            by_std, by_length = (norm == _LAYER_NORM)[None, :], (norm == _CONSTANT_NORM)[None, :]
            inverse_length = root / tl.maximum(length, _SMALLEST_NORM)
            read_scale = tl.where(by_std, (1.0 / (std + _LAYER_NORM_EPS))[:, None], read_scale)
            read_scale = tl.where(by_length, inverse_length[:, None], read_scale)
            write_scale = tl.where(by_std, std[:, None], write_scale)
            write_scale = tl.where(by_length, (length / root)[:, None], write_scale)
        bias = tl.load(record + FLOATS, mask=exists, other=0).to(tl.float32, bitcast=True)
        threshold = tl.load(record + FLOATS + 1, mask=exists, other=0).to(tl.float32, bitcast=True)
        scale = tl.load(record + FLOATS + 2, mask=exists, other=0).to(tl.float32, bitcast=True)
        shift = tl.load(record + FLOATS + 3, mask=exists, other=0).to(tl.float32, bitcast=True)
        low = tl.load(record + FLOATS + 4, mask=exists, other=0).to(tl.float32, bitcast=True)
        high = tl.load(record + FLOATS + 5, mask=exists, other=0).to(tl.float32, bitcast=True)
        p = products * read_scale + bias[None, :]
        if HAS_RANKED:
            ranked = tl.load(record + ENCODER, mask=exists, other=-1) >= 0
            ranked_at = at_token * coefficient_stride + (edit - base)[None, :]
            # Of the tokens that an edit does not act on, nothing was ranked.
            ranked_here = ranked[None, :] & acts
            p = tl.where(ranked_here, tl.load(pre_act_ptr + ranked_at, mask=ranked_here, other=0.0), p)
        f = tl.where(reads[None, :] & (p > threshold[None, :]), p, 0.0)
        if HAS_RANKED:
            f *= tl.load(survival_ptr + ranked_at, mask=ranked_here, other=1.0)
        g = tl.minimum(tl.maximum(scale[None, :] * f + shift[None, :], low[None, :]), high[None, :])
        holds = (f > low[None, :]) == (scale >= 0.0)[None, :]
        coefficient = tl.where(is_condition[None, :], holds.to(tl.float32), write_scale * (g - f))
        coefficient = tl.where(acts, coefficient, 0.0)
        tl.store(coefficient_rows + (edit - base)[None, :], coefficient, mask=exists[None, :])
    if begin == end:
        return
    # Other threads of this program wrote what is read next.
    tl.debug_barrier()

    acting = tl.zeros([TOKENS], dtype=tl.int32)
    keeps = tl.zeros([TOKENS], dtype=tl.int32)
    for first in range(begin, end, EDITS):
        edit = first + tl.arange(0, EDITS)
        record = table_ptr + edit * WORDS
        start = tl.load(record + START, mask=edit < end, other=0)
        stop = tl.load(record + STOP, mask=edit < end, other=0)
        keep = tl.load(record + PRESERVE_NORM, mask=edit < end, other=0)
        acts = ((tokens[:, None] >= start[None, :]) & (tokens[:, None] < stop[None, :])).to(tl.int32)
        acting = tl.maximum(acting, tl.max(acts, axis=1))
        gate = tl.load(record + GATE, mask=edit < end, other=0)
        n_conditions = gate // GATE_COUNT
        most = tl.max(n_conditions, axis=0)
        if most > 0:
            is_open = tl.full([TOKENS, EDITS], 1.0, dtype=tl.float32)
            for i in range(most):
                at = coefficient_rows + (gate % GATE_COUNT + i)[None, :]
                is_open *= tl.load(at, mask=(i < n_conditions)[None, :], other=1.0)
            at = coefficient_rows + (edit - base)[None, :]
            coefficient = tl.load(at, mask=(edit < end)[None, :], other=0.0)
            # Not a product: what is closed is 0 whatever it would have been.
            tl.store(at, tl.where(is_open > 0.0, coefficient, 0.0), mask=(n_conditions > 0)[None, :])
            acts = tl.where(is_open > 0.0, acts, 0)
            tl.debug_barrier()
        keeps = tl.maximum(keeps, tl.max(acts * keep[None, :], axis=1))
    factor = tl.full([TOKENS], 1.0, dtype=tl.float32)
    keeps_any = tl.max(keeps, axis=0) > 0
    if keeps_any:
        before = tl.zeros([TOKENS], dtype=tl.float32)
        after = tl.zeros([TOKENS], dtype=tl.float32)
        for column_start in range(0, d_model, COLUMNS):
            at = column_start + column
            inside = at < d_model
            x = _stream(hidden_rows, residual_rows, at, inside, HAS_RESIDUAL)
            edited = x + _delta(
                bank_ptr, table_ptr, coefficient_rows, begin, end, base, at, inside, bank_stride,
                GROUPED, TOKENS, EDITS, COLUMNS, PRECISION,
            )  # fmt: skip
            before += tl.sum(x * x, axis=1)
            after += tl.sum(edited * edited, axis=1)
        factor = tl.where((keeps > 0) & (after > 0.0), tl.sqrt(before) / tl.sqrt(after), 1.0)
    for column_start in range(0, d_model, COLUMNS):
        at = column_start + column
        inside = at < d_model
        delta = _delta(
            bank_ptr, table_ptr, coefficient_rows, begin, end, base, at, inside, bank_stride,
            GROUPED, TOKENS, EDITS, COLUMNS, PRECISION,
        )  # fmt: skip
        hidden = tl.load(hidden_rows + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        new = hidden + delta
        changed = delta != 0.0
        if keeps_any:
            residual = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
            if HAS_RESIDUAL:
                residual = tl.load(residual_rows + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            x = hidden + residual
            scaled = (x + delta) * factor[:, None]
            new = tl.where((keeps > 0)[:, None], scaled - residual, new)
            changed = tl.where((keeps > 0)[:, None], scaled != x, changed)
        # Comparisons, where minimum and maximum would turn NaN into the limit.
        new = tl.where(new > limit, limit, tl.where(new < -limit, -limit, new))
        new = tl.where(changed, new, hidden)
        mask = inside[None, :] & (acting > 0)[:, None]
        tl.store(hidden_rows + at[None, :], new.to(hidden_ptr.dtype.element_ty), mask=mask)
    tl.atomic_add(edited_ptr + site, tl.sum(acting, axis=0))


def launch_meta(grouped: bool, d_model: int, dtype: torch.dtype, backend: str) -> dict[str, object]:
    """The compile-time choices of one form. backend: as Triton names it."""
    exact = dtype == torch.float32 or backend == "hip"
    # Three products of rounded parts keep float32's precision on the matrix units; AMD's have no such mode.
    precision = "ieee" if exact else "tf32x3"
    if grouped:
        # Wider tiles spill registers (kernels_aot.md).
        return dict(GROUPED=True, TOKENS=BLOCK, EDITS=16, COLUMNS=32, PRECISION=precision, num_warps=4, num_stages=3)
    columns = min(512, triton.next_power_of_2(d_model))
    return dict(GROUPED=False, TOKENS=1, EDITS=8, COLUMNS=columns, PRECISION=precision, num_warps=4, num_stages=2)


def apply_table(hidden: torch.Tensor, residual: torch.Tensor | None, table: StepTable, site: int) -> None:
    """Edit `hidden` [tokens, d_model] in place by what `table` holds for `site`; leave behind what later sites read.

    residual: as in `apply_edits`. Both have contiguous rows and the bank's dtype. Sites of one forward run in order.
    Legal in a CUDA graph, while the table does not grow and `longest_group` stays on one side of BLOCK: the launches
    depend on nothing else but shapes.
    """
    # The rest, padding among it, is nobody's.
    n_tokens, d_model = min(len(hidden), table.held_tokens), hidden.shape[1]
    other = hidden if residual is None else residual
    operands = (
        hidden, other, table.bank, table.token_group, table.first_write, table.first_read, table.records,
        table.coefficients, table.pre_acts, table.survival, table.edited, site, table.group_offsets, n_tokens, d_model,
        hidden.stride(0), other.stride(0), table.bank.stride(0), table.stride, stream_limit(hidden.dtype),
    )  # fmt: skip
    rank(hidden, residual, table, site)
    has = dict(HAS_RESIDUAL=residual is not None, HAS_RANKED=site in table.rankings)
    block = BLOCK if n_tokens >= GROUPED_FROM and table.longest_group >= BLOCK else 0
    for grouped in (False, True) if block else (False,):
        meta = launch_meta(grouped, d_model, hidden.dtype, triton_backend())
        grid = (n_tokens // BLOCK if grouped else n_tokens,)
        _apply_edits[grid](*operands, BLOCK=block, **has, **meta)
