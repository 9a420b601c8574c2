"""The kernel that is compiled for CPUs: when it is chosen, and tokens with many edits, beside `test_apply_edits.py`."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_kernels.apply_edits import TopKEncoder, apply_edits_reference, prepare_edits
from tests.kernels.edit_cases import build_edits

INF = float("inf")
ROWS = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)) / 24**0.5
ENCODER = TopKEncoder(torch.zeros(24, 6), torch.zeros(6), 2)


@pytest.mark.parametrize(
    ("record", "rows", "compiled"),
    [
        (dict(read=0, threshold=0.0), ROWS, True),
        (dict(stop=18, preserve_norm=True), ROWS, True),
        # Of these, the torch path has what is rare.
        (dict(read=0), ROWS.bfloat16(), False),
        (dict(read=0, norm=1), ROWS, False),
        (dict(read=0, source=2), ROWS, False),
        (dict(read=0, encoder=0), ROWS, False),
    ],
)
def test_what_is_compiled(record, rows, compiled):
    prepared = prepare_edits(build_edits([record, dict(start=20, stop=21)]), rows, [ENCODER])
    assert (prepared.compiled is not None) == compiled


def test_a_tokens_numbers_do_not_depend_on_the_batch():
    """Alone, in a span, or beside others: to the bit."""
    hidden = torch.randn(300, 24)
    edit = dict(read=0, write=1, threshold=0.0, scale=3.0)

    def edited(start, stop, *others):
        out = hidden.clone()
        prepare_edits(build_edits([edit | dict(start=start, stop=stop), *others]), ROWS).apply(out, None)
        return out

    alone = edited(250, 251)[250]
    assert torch.equal(edited(2, 300)[250], alone)
    assert torch.equal(edited(250, 251, dict(start=0, stop=200, read=2, write=3, scale=2.0))[250], alone)


RECORD = st.fixed_dictionaries(
    dict(
        start=st.integers(0, 6),
        read=st.integers(-1, 5),
        write=st.integers(0, 5),
        bias=st.floats(-1, 1, width=32),
        threshold=st.sampled_from([-INF, 0.0]),
        scale=st.floats(-2, 2, width=32),
        shift=st.floats(-2, 2, width=32),
        low=st.sampled_from([-INF, -0.5]),
        high=st.sampled_from([INF, 0.75]),
    )
)


@settings(max_examples=200)
@given(st.lists(RECORD, min_size=1, max_size=30), st.booleans(), st.sets(st.integers(0, 6)), st.integers(0, 2**31))
def test_tokens_of_many_edits(records, has_residual, kept, seed):
    """In a stream whose rows are apart in memory, as a slice's are."""
    generator = torch.Generator().manual_seed(seed)
    streams = torch.randn(2, 7, 48, generator=generator)[..., ::2] + 2.0
    residual = streams[1] if has_residual else None
    edits = build_edits([r | dict(stop=r["start"] + 1, preserve_norm=r["start"] in kept) for r in records])
    stream = (streams[0] if residual is None else streams[0] + residual).double()
    reads = edits.read >= 0
    pre = (stream[edits.start[reads]] * ROWS[edits.read[reads]].double()).sum(-1).numpy() + edits.bias[reads]
    if (np.abs(pre) < 1e-4).any():
        # Within rounding of its threshold a feature may be on or off.
        return
    expected = apply_edits_reference(streams[0], residual, ROWS, edits)
    if (expected if residual is None else expected + residual).norm(dim=-1).min() < 0.5:
        # What preserves a norm divides by that of the edited stream.
        return
    prepared = prepare_edits(edits, ROWS)
    assert prepared.compiled is not None
    prepared.apply(streams[0], residual)
    assert torch.allclose(streams[0].double(), expected, atol=1e-4)
    untouched = [t for t in range(7) if t not in edits.start]
    assert torch.equal(streams[0][untouched].double(), expected[untouched])


@pytest.mark.parametrize("shape", [(3, 24), (4, 23)])
def test_a_stream_of_another_shape_is_refused(shape):
    """The compiled kernel itself checks no bounds."""
    prepared = prepare_edits(build_edits([dict(start=3, stop=4, read=0)]), ROWS)
    with pytest.raises(IndexError, match=f"up to 3 and width 24 in a stream of {shape[0]} tokens and width {shape[1]}"):
        prepared.apply(torch.zeros(shape), None)
