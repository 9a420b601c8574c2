"""What the Triton kernel will find where, without Triton."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_kernels.apply_edits.edits import TopKEncoder
from steer_kernels.apply_edits.step_table import FLOATS, INTEGERS, READ_ORDER, WORDS, Room, StepTable
from tests.kernels.edit_cases import build_edits, token_groups

SITES = 3


def found(step_table, token, site, order):
    """The records (as dicts) that a program finds for a token at a site, in the "write" or the "read" order."""
    if token >= step_table.held_tokens:
        return []
    group = int(step_table.token_group[token])
    if group < 0:
        return []
    first = step_table.first_write if order == "write" else step_table.first_read
    at = group * (SITES + 1) + site + (order == "write")
    begin, end = first[at].item(), first[at + 1].item()
    records = step_table.records.view(-1, WORDS)
    places = range(begin, end) if order == "write" else records[begin:end, READ_ORDER].tolist()
    result = []
    for place in places:
        integers = dict(zip(INTEGERS, records[place].tolist(), strict=False))
        floats = records[place, len(INTEGERS) : READ_ORDER].clone().view(torch.float32).tolist()
        result.append(integers | dict(zip(FLOATS, floats, strict=True)))
    return [r for r in result if r["start"] <= token < r["stop"]]


@st.composite
def forwards(draw):
    spans = st.tuples(st.integers(0, 15), st.integers(1, 9))
    records, sites = [], []
    for number in range(draw(st.integers(1, 12))):
        start, length = draw(spans)
        sites.append(draw(st.integers(0, SITES - 1)))
        source = draw(st.sampled_from([-1, -1, *range(sites[-1])]))
        read = draw(st.integers(-1, 3))
        records.append(dict(start=start, stop=start + length, read=read, source=source, shift=float(number)))
    return build_edits(records), np.array(sites)


@settings(max_examples=200)
@given(st.lists(forwards(), min_size=1, max_size=3))
def test_every_token_finds_its_edits_where_they_are_written_and_read(steps):
    step_table = StepTable(torch.zeros(4, 8), SITES)
    for edits, sites in steps:
        step_table.fill(edits, sites, token_groups(edits))
    source = np.where((edits.source < 0) | (edits.read < 0), sites, edits.source)
    for token in range(64):
        acting = (edits.start <= token) & (token < edits.stop)
        for site in range(SITES):
            written = sorted(r["shift"] for r in found(step_table, token, site, "write"))
            assert written == sorted(edits.shift[acting & (sites == site)].tolist())
            read = sorted(r["shift"] for r in found(step_table, token, site, "read"))
            assert read == sorted(edits.shift[acting & (source == site)].tolist())


@given(st.integers(1, 70), st.integers(1, 4))
def test_each_part_begins_on_a_line(tokens, n_groups):
    """Triton compiles a kernel anew where a pointer is aligned and was not before, or the reverse."""
    table = StepTable(torch.zeros(2, 8), SITES)
    edits = build_edits([dict(start=i, stop=i + 1, write=0, read=-1) for i in range(n_groups)])
    edits.stop[-1] = max(n_groups, tokens)
    table.fill(edits, np.zeros(n_groups, dtype=np.int64), np.arange(n_groups))
    assert table.longest_group == max(n_groups, tokens) - (n_groups - 1)
    first = table.token_group.data_ptr()
    for part in (table.first_write, table.first_read, table.records):
        assert (part.data_ptr() - first) % 64 == 0


def test_a_table_with_room_allocates_nothing_later():
    """The largest forward that there is room for, through an encoder, and a smaller one before it."""
    encoder = TopKEncoder(torch.zeros(8, 4), torch.zeros(4), 2)
    table = StepTable(torch.zeros(2, 8), SITES, [encoder], Room(tokens=24, groups=3, edits=6, edits_a_group=2))
    held = table.nbytes

    def buffers():
        return [part.data_ptr() for part in (table.records, table.coefficients, table.pre_acts, table.survival)]

    before = buffers()
    for per_group in (1, 2):
        group = np.repeat(np.arange(3), per_group)
        one = dict(write=0, read=1, encoder=0, feature=3)
        edits = build_edits([dict(start=8 * g, stop=8 * g + 8, **one) for g in group.tolist()])
        table.fill(edits, np.zeros(len(group), dtype=np.int64), group)
        assert buffers() == before
        assert table.nbytes == held
    table.fill(build_edits([dict(start=0, stop=25, **one)]), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    assert table.nbytes > held
