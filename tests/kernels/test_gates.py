"""Gates: rows that act only where conditions hold, against the float64 definition, in every form of the kernel."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_kernels.apply_edits import Gates, Site, TokenNorm, TopKEncoder, apply_edits_reference, prepare_edits
from steer_kernels.apply_edits.step_table import GATE_COUNT, StepTable
from tests.kernels.conftest import INTERPRETED
from tests.kernels.edit_cases import (
    INF,
    assert_matches_reference,
    build_edits,
    compare_drawn,
    encoder_on,
    run,
    token_groups,
)

EXAMPLES = 15 if INTERPRETED else 200
ABOVE, NOT_ABOVE = 1.0, -1.0


def condition(gate, read, bound=0.0, way=ABOVE, **record):
    return dict(gate=gate, read=read, write=-1, low=bound, scale=way) | record


@st.composite
def gated_tables(draw):
    tokens = draw(st.sampled_from([1, 2, 9, 33, 64]))
    n_rows = draw(st.integers(1, 5))
    bound = st.floats(-2, 2, width=32)
    source = st.sampled_from([-1, -1, 0, 1])

    def reads(least):
        return dict(
            read=draw(st.integers(least, n_rows - 1)),
            bias=draw(bound),
            threshold=draw(st.sampled_from([-INF, 0.0, 0.5])),
            norm=draw(st.sampled_from([0, 0, 1, 2])),
            source=draw(source),
        )

    n_gates = draw(st.integers(1, 3))
    edits = []
    for _ in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, tokens - 1))
        edits.append(
            reads(-1)
            | dict(
                start=start,
                stop=draw(st.integers(start + 1, tokens)),
                write=draw(st.integers(0, n_rows - 1)),
                scale=draw(bound),
                shift=draw(bound),
                gate=draw(st.integers(-1, n_gates - 1)),
                preserve_norm=draw(st.booleans()),
            )
        )
    conditions = []
    for gate in {edit["gate"] for edit in edits} - {-1}:
        reach = dict(
            start=min(edit["start"] for edit in edits if edit["gate"] == gate),
            stop=max(edit["stop"] for edit in edits if edit["gate"] == gate),
        )
        for _ in range(draw(st.integers(1, 3))):
            asked = condition(gate, 0, draw(bound), draw(st.sampled_from([ABOVE, NOT_ABOVE])))
            conditions.append(asked | reads(0) | reach)
    records = draw(st.permutations(edits + conditions))
    return tokens, n_rows, records, draw(st.integers(0, 2**31)), draw(st.booleans())


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(gated_tables(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_matches_the_definition(form, table, dtype):
    # Far from zero, so that what preserves a norm divides by none that is small.
    compare_drawn(form, table, dtype, mean=4.0, least_distance=1e-3)


@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", [(2, 3), (2, 34)], ids=["decode", "prefill"])
def test_a_closed_gate_leaves_the_token_as_it_is_to_the_bit(form, span, dtype, preserve_norm):
    """Constants, rows that read, and rows that would write infinity; tokens of which the condition holds change."""
    torch.manual_seed(0)
    hidden, residual = torch.randn(2, 36, 24).to(dtype)
    rows = torch.randn(4, 24).to(dtype)
    on = dict(start=span[0], stop=span[1])
    acting = [
        on | dict(write=1, shift=2.0, gate=0, preserve_norm=preserve_norm),
        on | dict(read=2, write=3, scale=3.0, gate=0, preserve_norm=preserve_norm),
    ]
    for way in (ABOVE, NOT_ABOVE):
        out = run(form, hidden, residual, rows, build_edits([*acting, on | condition(0, 0, 0.0, way)]))
        above = (hidden.double() + residual.double()) @ rows[0].double() > 0
        holds = above if way == ABOVE else ~above
        steered = [t for t in range(36) if span[0] <= t < span[1] and holds[t]]
        others = [t for t in range(36) if t not in steered]
        assert torch.equal(out[others], hidden[others])
        assert all((out[t] != hidden[t]).any() for t in steered)
    never = condition(0, 0, INF)
    infinite = on | dict(read=2, write=3, scale=3e38, shift=3e38, gate=0, preserve_norm=preserve_norm)
    assert torch.equal(run(form, hidden, residual, rows, build_edits([infinite, on | never])), hidden)


@pytest.mark.parametrize(("bound", "way", "holds"), [(1.0, ABOVE, False), (1.0, NOT_ABOVE, True), (0.5, ABOVE, True)])
def test_a_value_at_the_bound(form, bound, way, holds):
    """`above` is strict, so its opposite is not."""
    rows = torch.eye(2)
    edits = build_edits([dict(write=1, shift=5.0, gate=0), condition(0, 0, bound, way)])
    out = run(form, torch.tensor([[1.0, 0.0]]), None, rows, edits)
    assert out.tolist() == [[1.0, 5.0 if holds else 0.0]]


def test_a_feature_that_is_not_a_number_is_off(form):
    hidden = torch.tensor([[float("nan"), 0.0], [1.0, 0.0]])
    rows = torch.eye(2)
    for way, moved in ((ABOVE, [False, True]), (NOT_ABOVE, [True, False])):
        asked = condition(0, 0, 0.5, way, threshold=0.0, stop=2)
        out = run(form, hidden, None, rows, build_edits([dict(write=1, shift=5.0, gate=0, stop=2), asked]))
        assert (out[:, 1] == 5.0).tolist() == moved


@pytest.mark.parametrize("stop", [1, 20], ids=["decode", "prefill"])
@pytest.mark.parametrize("norm", list(TokenNorm), ids=lambda norm: norm.name)
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_nothing_scales_a_condition(form, value, norm, stop):
    """Of streams to which a token norm's scale is 0, or is not a number."""
    streams = {0: torch.full((20, 8), value)}
    hidden, rows = torch.zeros(20, 8), torch.eye(8)
    for way, moved in ((ABOVE, False), (NOT_ABOVE, True)):
        asked = condition(0, 0, 0.5, way, threshold=0.0, stop=stop, norm=int(norm), source=0)
        edits = build_edits([asked, dict(write=1, shift=5.0, gate=0, stop=stop)])
        out = run(form, hidden, None, rows, edits, sources=streams)
        assert (out[:, 1] == 5.0).tolist() == [moved and token < stop for token in range(20)]


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("source", [-1, 0])
def test_topk_membership_decides_gates(form, tokens, source):
    """Integers, so that ties are many and rounding decides nothing; beside edits that go through the encoder too."""
    torch.manual_seed(tokens)
    d_model, d_sae = 12, 48
    encoder = TopKEncoder(torch.randint(-2, 3, (d_model, d_sae)).float(), torch.zeros(d_sae), 5)
    hidden, elsewhere = torch.randint(-3, 4, (2, tokens, d_model)).float()
    rows = torch.cat([encoder.W_enc.T, torch.randn(d_sae, d_model)])
    records = []
    for gate, feature in enumerate((0, 7, 30, 47)):
        through = dict(stop=tokens, threshold=0.0, encoder=0, source=source)
        records += [
            through | condition(gate, feature, 1.0, feature=feature),
            dict(stop=tokens, write=d_sae + feature, shift=1.0, gate=gate),
            through | dict(read=feature + 1 if feature < 47 else 1, write=d_sae + 2, scale=2.0, gate=gate)
            | dict(feature=feature + 1 if feature < 47 else 1),
        ]  # fmt: skip
    assert_matches_reference(form, hidden, None, rows, build_edits(records), [encoder], {0: elsewhere})


def test_one_table_of_many_requests_at_many_sites(triton_device):
    """Conditions read at one site decide at all later ones; requests without gates and with several beside them."""
    from steer_kernels.apply_edits.triton_kernel import apply_table

    torch.manual_seed(0)
    n_sites, tokens, d_model = 4, 23, 40
    hidden = torch.randn(n_sites, tokens, d_model)
    rows = torch.randn(12, d_model) / d_model**0.5
    records, sites = [], []

    def add(site, **record):
        records.append(record)
        sites.append(site)

    for start, stop in ((0, 1), (1, 9), (9, 10), (12, 23)):
        on = dict(start=start, stop=stop)
        for site in range(n_sites):
            add(site, **on, write=site, shift=1.0, gate=start if site else -1)
            add(site, **on, read=site + 4, write=site + 1, scale=2.0, gate=start + 100 if site > 1 else -1)
        add(0, **on, **condition(start, 8))
        add(1, **on, **condition(start + 100, 9))
        add(2, **on, **condition(start + 100, 10, -0.5, NOT_ABOVE))
    add(3, start=10, stop=11, write=5, shift=2.0)
    edits, site = build_edits(records), np.array(sites)
    table = StepTable(rows.to(triton_device), n_sites)
    table.fill(edits, site, token_groups(edits))
    out = hidden.to(triton_device, copy=True)
    for i in range(n_sites):
        apply_table(out[i], None, table, i)
    at = [{"source": s} if r["write"] == -1 else {} for r, s in zip(records, sites, strict=True)]
    elsewhere = build_edits([r | source for r, source in zip(records, at, strict=True)])
    streams = dict(enumerate(hidden))
    for i in range(n_sites):
        here = elsewhere.take(elsewhere.is_condition | (site == i))
        expected = apply_edits_reference(hidden[i], None, rows, here, sources=streams)
        assert torch.allclose(out[i].cpu().double(), expected, atol=1e-4), i
    assert table.edited.tolist() == [21, 21, 21, 22], "what a gate closes was still looked at, as was asked"


def test_nothing_is_written_before_all_conditions_were_read():
    rows = torch.eye(3)
    conditions = build_edits([condition(7, 0, 0.5), condition(7, 1, 0.5), condition(2, 2, 0.5)])
    gates = Gates.of(conditions, np.array([0, 1, 3]), rows)
    sites = [Site() for _ in range(3)]
    for reads in gates.reads[:2]:
        sites[reads.source].reads.append(reads)
    sites[2].edits = prepare_edits(build_edits([dict(write=2, shift=1.0, gate=7)]), rows, (), gates)
    streams = torch.tensor([[[1.0, 0, 0]], [[0, 1.0, 0]], [[0, 0, 0]]])
    for skipped in (0, 1, None):
        for site in sites:
            site.start_forward()
        hidden = streams.clone()
        for i, site in enumerate(sites):
            if i != skipped:
                site.apply(hidden[i], None)
        ran = skipped is None
        assert (sites[2].runs, hidden[2].tolist()) == (int(ran), [[0.0, 0.0, float(ran)]])
    # A forward in which one of them does not hold, and the next.
    for second in (0.0, 1.0):
        for site in sites:
            site.start_forward()
        hidden = streams.clone()
        hidden[1, 0, 1] = second
        for i, site in enumerate(sites):
            site.apply(hidden[i], None)
        assert hidden[2].tolist() == [[0.0, 0.0, second]]


def test_more_conditions_than_a_record_names_are_refused():
    table = StepTable(torch.zeros(2, 8), 1)
    many = build_edits([dict(write=0, gate=0), *[condition(0, 0)] * (GATE_COUNT // 2)])
    at = np.zeros(len(many), dtype=np.int64)
    with pytest.raises(ValueError, match="a gate has 32768 conditions"):
        table.fill(many, at, at)


def test_capture(triton_device):
    """A CUDA graph that was captured with nothing to do serves gates."""
    from steer_kernels.apply_edits.step_table import Ranking, Room
    from steer_kernels.apply_edits.triton_kernel import apply_table
    from tests.launch_recorder import captured

    torch.manual_seed(0)
    n_sites, tokens, d_model = 2, 5, 24
    encoder = TopKEncoder(torch.randn(d_model, 48), torch.randn(48) * 0.1, 4, floor=0.0)
    rows = torch.cat([encoder.W_enc.T, torch.randn(4, d_model)])
    room = Room(tokens=8, groups=5, edits=20, edits_a_group=4)
    table = StepTable(rows.to(triton_device), n_sites, [encoder_on(encoder, triton_device)], room)
    hidden = torch.zeros(n_sites, tokens, d_model, device=triton_device)

    def forward():
        for site in range(n_sites):
            apply_table(hidden[site], None, table, site)

    table.any_launch({0: [Ranking(0, 0, TokenNorm.NONE)]})
    graph = captured(forward, triton_device)
    streams = torch.randn(n_sites, tokens, d_model)
    for feature in (3, 11, 40):
        records, sites = [], []
        for token in range(tokens):
            on = dict(start=token, stop=token + 1)
            bias = float(encoder.b_enc[feature])
            records += [
                on | condition(token, feature, 0.5, bias=bias, encoder=0, feature=feature, threshold=0.0),
                on | dict(write=48, shift=1.0, gate=token),
                on | dict(write=49, shift=1.0),
            ]
            sites += [0, 1, 1]
        edits = build_edits(records)
        hidden.copy_(streams)
        table.fill(edits, np.array(sites), token_groups(edits))
        graph.replay()
        here = build_edits([r | dict(source=0) if r["write"] == -1 else r for r in records])
        expected = apply_edits_reference(streams[1], None, rows, here, [encoder], {0: streams[0]})
        assert torch.allclose(hidden[1].cpu().double(), expected, atol=1e-4)
        assert torch.equal(hidden[0].cpu(), streams[0])
