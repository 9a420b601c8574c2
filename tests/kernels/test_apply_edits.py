"""The torch path and the Triton kernel against the float64 definition, on tables that hypothesis draws."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_kernels.apply_edits import (
    Site,
    TokenNorm,
    TopKEncoder,
    apply_edits,
    apply_edits_reference,
    bind_sites,
    prepare_edits,
    read_activations,
)
from steer_kernels.apply_edits.reference import is_topk_member, survival, token_scales
from steer_kernels.apply_edits.step_table import StepTable
from tests.kernels.conftest import INTERPRETED
from tests.kernels.edit_cases import INF, assert_matches_reference, build_edits, compare_drawn, encoder_on, run

EXAMPLES = 10 if INTERPRETED else 150


@pytest.fixture(autouse=True)
def _unbind_sites():
    yield
    bind_sites(())


@st.composite
def tables(draw):
    tokens = draw(st.sampled_from([1, 2, 7, 33, 64]))
    n_rows = draw(st.integers(1, 5))
    bound = st.floats(-3, 3, width=32)
    records = []
    for _ in range(draw(st.integers(1, 12))):
        start = draw(st.integers(0, tokens - 1))
        low, high = sorted((draw(bound), draw(bound)))
        records.append(
            dict(
                start=start,
                stop=draw(st.integers(start + 1, tokens)),
                read=draw(st.integers(-1, n_rows - 1)),
                write=draw(st.integers(0, n_rows - 1)),
                bias=draw(bound),
                threshold=draw(st.sampled_from([-INF, 0.0, 0.5])),
                scale=draw(bound),
                shift=draw(bound),
                low=draw(st.sampled_from([-INF, low])),
                high=draw(st.sampled_from([INF, high])),
                norm=draw(st.sampled_from([0, 0, 1, 2])),
                source=draw(st.sampled_from([-1, -1, 0, 1])),
                preserve_norm=draw(st.booleans()),
            )
        )
    return tokens, n_rows, records, draw(st.integers(0, 2**31)), draw(st.booleans())


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(tables(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_matches_the_definition(form, table, dtype):
    compare_drawn(form, table, dtype, mean=0.0, least_distance=1e-4)


OPS = {
    "set": dict(scale=0.0, shift=2.5),
    "add": dict(scale=1.0, shift=2.5),
    "min": dict(low=1.5),
    "max": dict(high=0.25),
    "scale": dict(scale=-1.5),
    "ablate": dict(scale=0.0),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("span", [(3, 4), (2, 40)], ids=["decode", "prefill"])
def test_every_op_through_relu(form, op, span):
    torch.manual_seed(0)
    hidden, residual = torch.randn(2, 41, 17)
    rows = torch.randn(2, 17)
    edits = build_edits([dict(start=span[0], stop=span[1], read=0, write=1, bias=0.1, threshold=0.0, **OPS[op])])
    assert_matches_reference(form, hidden, residual, rows, edits)
    untouched = [t for t in range(41) if not span[0] <= t < span[1]]
    assert torch.equal(run(form, hidden, residual, rows, edits)[untouched], hidden[untouched])


def test_more_edits_than_a_program_takes_at_once(form):
    """Of one request, at a width that is no multiple of anything, beside tokens of nobody and of others."""
    torch.manual_seed(0)
    hidden, residual = torch.randn(2, 75, 577)
    rows = torch.randn(50, 577) / 577**0.5
    many = [dict(start=2, stop=70, read=i, write=i + 10, threshold=0.0, scale=0.5) for i in range(37)]
    few = [dict(start=i, stop=i + 1, read=i % 50, write=0, shift=1.0, norm=i % 3) for i in range(71, 74)]
    assert_matches_reference(form, hidden, residual, rows, build_edits(few + many))


def test_a_smaller_step_with_more_edits_after_a_larger_one(form, triton_device):
    """Of ranked features too: what the table holds for the tokens of one is not enough for the edits of the other."""
    from steer_kernels.apply_edits.triton_kernel import apply_table

    torch.manual_seed(0)
    encoder = TopKEncoder(torch.randn(24, 48), torch.randn(48) * 0.1, 4)
    rows = torch.cat([encoder.W_enc.T, torch.randn(1, 24)])
    table = StepTable(rows.to(triton_device), 1, [encoder_on(encoder, triton_device)])
    for steered, n_edits in ((9, 1), (2, 8), (9, 2)):
        hidden, residual = torch.randn(2, 40, 24)
        edits = build_edits(
            [
                dict(stop=steered, read=i, write=48, bias=float(encoder.b_enc[i]), threshold=0.0, scale=2.0, encoder=0,
                     feature=i)
                for i in range(n_edits)
            ]
        )  # fmt: skip
        table.fill(edits, np.zeros(n_edits, dtype=np.int64), np.zeros(n_edits, dtype=np.int64))
        out = hidden.to(triton_device, copy=True)
        apply_table(out, residual.to(triton_device), table, 0)
        expected = apply_edits_reference(hidden, residual, rows, edits, [encoder])
        assert torch.allclose(out.cpu().double(), expected, atol=1e-4)


def test_projecting_out_leaves_no_component(form):
    torch.manual_seed(1)
    hidden, residual = torch.randn(2, 20, 64)
    direction = torch.nn.functional.normalize(torch.randn(1, 64), dim=-1)
    for stop in (1, 20):
        edits = build_edits([dict(stop=stop, read=0, write=0, scale=0.0)])
        out = run(form, hidden, residual, direction, edits) + residual
        assert (out[:stop] @ direction[0]).abs().max() < 1e-5


def test_reads_see_the_incoming_stream(form):
    """Two rows that would feed each other if one were applied first."""
    hidden = torch.tensor([[1.0, 0.0]])
    rows = torch.eye(2)
    swap = [dict(read=0, write=1, scale=2.0), dict(read=1, write=0, scale=2.0)]
    assert torch.equal(run(form, hidden, None, rows, build_edits(swap)), torch.tensor([[1.0, 1.0]]))
    assert torch.equal(run(form, hidden, None, rows, build_edits(swap[::-1])), torch.tensor([[1.0, 1.0]]))


@pytest.mark.parametrize("tokens", [1, 5, 40 if INTERPRETED else 300])
@pytest.mark.parametrize("k", [1, 4, 32])
def test_topk_membership(form, tokens, k):
    torch.manual_seed(k)
    d_model, d_sae = 24, 96
    encoder = TopKEncoder(torch.randn(d_model, d_sae), torch.randn(d_sae) * 0.1, k)
    hidden, residual = torch.randn(2, tokens, d_model)
    features = [0, 5, 95]
    rows = torch.cat([encoder.W_enc.T[features], torch.randn(3, d_model)])
    edits = build_edits(
        [
            dict(stop=tokens, read=i, write=3 + i, bias=float(encoder.b_enc[f]), threshold=0.0,
                 scale=0.0, shift=3.0, encoder=0, feature=f)
            for i, f in enumerate(features)
        ]
    )  # fmt: skip
    assert_matches_reference(form, hidden, residual, rows, edits, [encoder])
    # Scaling leaves an absent feature alone, so only members move.
    scaled = build_edits([dict(stop=tokens, read=0, write=3, bias=float(encoder.b_enc[0]), threshold=0.0,
                               scale=3.0, encoder=0, feature=0)])  # fmt: skip
    moved = (run(form, hidden, residual, rows, scaled, [encoder]) != hidden).any(-1)
    pre_acts = (hidden + residual) @ encoder.W_enc + encoder.b_enc
    member = torch.zeros(tokens, d_sae).scatter(1, pre_acts.topk(k).indices, 1.0)[:, 0].bool() & (pre_acts[:, 0] > 0)
    assert torch.equal(moved, member)


def test_topk_ties_go_to_the_lower_index(form):
    pre_acts = torch.tensor([2.0, 3.0, 2.0, 2.0])
    assert [is_topk_member(pre_acts, i, 2) for i in range(4)] == [True, True, False, False]
    encoder = TopKEncoder(torch.tensor([[2.0, 3.0, 2.0, 2.0]]), torch.zeros(4), 2)
    hidden, rows = torch.ones(1, 1), torch.tensor([[2.0], [1.0]])
    for feature in (0, 2, 3):
        edits = build_edits([dict(read=0, write=1, threshold=0.0, scale=0.0, encoder=0, feature=feature)])
        expected = 1.0 - 2.0 if feature == 0 else 1.0
        assert run(form, hidden, None, rows, edits, [encoder]).item() == expected


@pytest.mark.parametrize("tokens", [3, 40])
def test_every_feature_of_a_topk_sae_at_once(tokens):
    """Half the encoder repeats the other half, so that every rank is a tie."""
    torch.manual_seed(0)
    d_model, d_sae, k = 12, 48, 7
    W_enc, b_enc = torch.randn(d_model, d_sae // 2).repeat(1, 2), (torch.randn(d_sae // 2) * 0.1).repeat(2)
    encoder = TopKEncoder(W_enc, b_enc, k)
    hidden, residual = torch.randint(-3, 4, (2, tokens, d_model)).float()
    rows = torch.cat([W_enc.T, torch.randn(d_sae, d_model)])
    edits = build_edits(
        [
            dict(stop=tokens, read=i, write=d_sae + i, bias=float(b_enc[i]), threshold=0.0, scale=2.0, encoder=0,
                 feature=i)
            for i in range(d_sae)
        ]
    )  # fmt: skip
    f = read_activations(hidden + residual, edits, rows, [encoder])
    assert ((f > 0).sum(-1) <= k).all()
    # The lower of two equal features is on wherever the upper is.
    assert ((f[:, : d_sae // 2] > 0) | (f[:, d_sae // 2 :] == 0)).all()
    out = run("torch", hidden, residual, rows, edits, [encoder])
    assert torch.allclose(out, hidden + f @ rows[d_sae:], atol=1e-4)
    if tokens == 40:
        pre_acts = (hidden + residual) @ W_enc + b_enc
        for token in range(tokens):
            members = [is_topk_member(pre_acts[token], i, k) and bool(pre_acts[token, i] > 0) for i in range(d_sae)]
            assert (f[token] > 0).tolist() == members


SELECTIONS = {
    "TopK": dict(k=5),
    "AbsTopK": dict(k=5, absolute=True),
    "GroupMax": dict(k=1, groups=8),
    "TopK of groups": dict(k=3, groups=4),
    "AbsTopK of groups": dict(k=2, groups=4, absolute=True),
    "Switch": dict(k=3, groups=4, routed=True),
}


@pytest.mark.parametrize("norm", list(TokenNorm), ids=lambda norm: norm.name)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("tokens", [17] if INTERPRETED else [1, 5, 40])
def test_selections_match_the_definition(form, selection, norm, tokens):
    """Every feature, on one token and on spans; without a token norm, which rounds, most ranks are ties of integers."""
    if INTERPRETED and form == "rows":
        tokens = 3
    torch.manual_seed(tokens)
    options = dict(SELECTIONS[selection])
    d_model, d_sae, groups = 10, 48, options.get("groups", 1)
    W_enc, b_enc = torch.randint(-2, 3, (d_model, d_sae)).float(), torch.zeros(d_sae)
    if norm is not TokenNorm.NONE:
        W_enc += torch.rand(d_model, d_sae)
    if options.pop("routed", False):
        W = torch.randint(-1, 2, (d_model, groups)).float()
        W[:, -1] = W[:, 0]
        options["router"] = (W, torch.tensor([0.5, 0.0, 0.0, 0.5]))
    encoder = TopKEncoder(W_enc, b_enc, **options)
    hidden = torch.randint(-3, 4, (tokens, d_model)).float()
    rows = torch.cat([W_enc.T, torch.randn(d_sae, d_model)])
    threshold = -INF if encoder.absolute else 0.0
    edits = build_edits(
        [
            dict(stop=tokens, read=i, write=d_sae + i, threshold=threshold, scale=2.0, encoder=0, feature=i,
                 norm=int(norm))
            for i in range(d_sae)
        ]
    )  # fmt: skip
    expected = torch.zeros(tokens, d_sae, dtype=torch.float64)
    for token in range(tokens):
        x = hidden[token].double()
        a, _ = token_scales(x, norm)
        for i in range(d_sae):
            p = a * float(x @ W_enc[:, i].double())
            expected[token, i] = (p if p > threshold else 0.0) * survival(a * x, i, encoder)
    assert (expected != 0).any()
    assert torch.allclose(read_activations(hidden, edits, rows, [encoder]).double(), expected, atol=1e-5)
    assert_matches_reference(form, hidden, None, rows, edits, [encoder])


@pytest.mark.parametrize("tokens", [1, 40])
def test_equal_experts_go_to_the_first(form, tokens):
    encoder = TopKEncoder(torch.ones(1, 4), torch.zeros(4), k=1, groups=2, router=(torch.ones(1, 2), torch.zeros(2)))
    hidden = torch.full((tokens, 1), 3.0)
    edits = build_edits([dict(stop=tokens, read=0, threshold=0.0, encoder=0, feature=i) for i in range(4)])
    f = read_activations(hidden, edits, torch.ones(1, 1), [encoder])
    assert torch.equal(f, torch.tensor([[1.5, 0.0, 0.0, 0.0]]).expand(tokens, 4))
    edits = build_edits([dict(stop=tokens, read=0, threshold=0.0, scale=2.0, encoder=0, feature=i) for i in range(4)])
    assert torch.equal(run(form, hidden, None, torch.ones(1, 1), edits, [encoder]), hidden + 1.5)


@pytest.mark.parametrize("span", [(0, 1), (0, 20)], ids=["decode", "prefill"])
@pytest.mark.parametrize("norm", [TokenNorm.LAYER_NORM, TokenNorm.CONSTANT_NORM], ids=lambda norm: norm.name)
def test_what_an_sae_on_normalised_streams_writes_grows_with_the_stream(form, norm, span):
    """SAELens scales what the SAE returns back, so that edits of a stream ten times as large are ten times as large."""
    torch.manual_seed(0)
    hidden, rows = torch.randn(20, 32), torch.randn(2, 32)
    rows[0] -= rows[0].mean()
    for record in (dict(read=0, write=1, threshold=0.0, scale=0.0, shift=2.0), dict(write=1, shift=2.0)):
        edits = build_edits([record | dict(start=span[0], stop=span[1], norm=int(norm))])
        assert_matches_reference(form, hidden, None, rows, edits)
        small = run(form, hidden, None, rows, edits) - hidden
        large = run(form, hidden * 10, None, rows, edits) - hidden * 10
        assert torch.allclose(large, small * 10, atol=1e-3)
        assert small[span[0] : span[1]].abs().max() > 0.1


@pytest.mark.parametrize("span", [(0, 1), (0, 20)], ids=["decode", "prefill"])
@pytest.mark.parametrize("norm", list(TokenNorm), ids=lambda norm: norm.name)
def test_a_zero_stream_stays_finite(form, norm, span):
    hidden, rows = torch.zeros(20, 16), torch.randn(2, 16)
    edits = build_edits([dict(start=span[0], stop=span[1], read=0, write=1, bias=0.5, shift=2.0, norm=int(norm))])
    assert_matches_reference(form, hidden, None, rows, edits)
    moved = run(form, hidden, None, rows, edits).abs().max() > 0
    assert moved == (norm is TokenNorm.NONE)


@pytest.mark.parametrize("span", [(2, 3), (2, 34)], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_at_one_site_and_writing_at_another(form, span, dtype):
    """Rows that read here, at two other sites, through an encoder there, and rows that read nothing, on one token."""
    torch.manual_seed(3)
    tokens, d_model, d_sae = 35, 16, 32
    hidden, residual = torch.randn(2, tokens, d_model).to(dtype)
    sources = {site: torch.randn(tokens, d_model).to(dtype) for site in (0, 4)}
    # Nothing of this one is used, by a row that neither reads nor is scaled.
    sources[7] = torch.full((tokens, d_model), float("nan"))
    encoder = TopKEncoder(torch.randn(d_model, d_sae), torch.zeros(d_sae), 4)
    rows = torch.cat([encoder.W_enc.T[:6], torch.randn(6, d_model) / 4]).to(dtype)
    encoder = TopKEncoder(torch.cat([rows[:6].float().T, encoder.W_enc[:, 6:]], 1), encoder.b_enc, encoder.k)
    on = dict(start=span[0], stop=span[1])
    records = [
        on | dict(read=0, write=6, threshold=0.0, scale=2.0),
        on | dict(read=1, write=7, threshold=0.0, scale=0.0, shift=1.0, source=0),
        on | dict(read=2, write=8, threshold=0.5, scale=-1.0, source=4, norm=1),
        on | dict(read=3, write=9, threshold=0.0, scale=3.0, source=4, encoder=0, feature=3),
        on | dict(write=10, shift=-1.0),
        on | dict(write=11, shift=0.5, source=4, norm=2),
        on | dict(write=11, shift=0.5, source=7),
    ]
    for preserve_norm in (False, True):
        edits = build_edits([record | {"preserve_norm": preserve_norm} for record in records])
        assert_matches_reference(form, hidden, residual, rows, edits, [encoder], sources)


def test_a_site_whose_reads_did_not_happen_does_nothing_and_counts_nothing():
    rows = torch.eye(2)
    edits = build_edits([dict(read=0, write=1, scale=2.0, source=0), dict(write=0, shift=1.0)])
    read_site, write_site = Site(), Site()
    write_site.edits = prepare_edits(edits, rows)
    read_site.reads = list(write_site.edits.remote)
    bind_sites([read_site, write_site])
    x, hidden = torch.tensor([[3.0, 0.0]]), torch.tensor([[5.0, 5.0]])
    apply_edits(hidden, None, 1)
    assert (write_site.runs, hidden.tolist()) == (0, [[5.0, 5.0]])
    apply_edits(x, None, 0)
    apply_edits(hidden, None, 1)
    assert (write_site.runs, hidden.tolist()) == (1, [[6.0, 8.0]])
    # What was read is used up: a second forward needs its own.
    apply_edits(hidden, None, 1)
    assert write_site.runs == 1
    # What an interrupted forward left behind is not the next one's.
    apply_edits(x, None, 0)
    for site in (read_site, write_site):
        site.start_forward()
    apply_edits(hidden, None, 1)
    assert (write_site.runs, hidden.tolist()) == (0, [[6.0, 8.0]])


def test_preserve_norm_keeps_the_norm_and_survives_zero(form):
    torch.manual_seed(2)
    hidden, residual = torch.randn(2, 12, 16)
    rows = torch.randn(1, 16)
    add = dict(write=0, shift=5.0, preserve_norm=True)
    out = run(form, hidden, residual, rows, build_edits([add | dict(stop=12)])) + residual
    assert torch.allclose(out.norm(dim=-1), (hidden + residual).norm(dim=-1), rtol=1e-5)
    zeroed = run(form, rows * -5.0, None, rows, build_edits([add]))
    assert torch.equal(zeroed, torch.zeros(1, 16))


def test_preserve_norm_rescales_every_element(form):
    """Those too whose value before happens to be theirs again."""
    torch.manual_seed(0)
    tokens = 40 if INTERPRETED else 512
    hidden, residual, rows = torch.randn(tokens, 576), torch.randn(tokens, 576), torch.randn(1, 576)
    edits = build_edits([dict(write=0, shift=0.1, stop=tokens, preserve_norm=True)])
    out = run(form, hidden, residual, rows, edits)
    assert torch.allclose(out.double(), apply_edits_reference(hidden, residual, rows, edits), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compounding_edits_stay_finite(form, dtype):
    hidden = torch.randn(3, 16).to(dtype)
    bystander = hidden[2].clone()
    rows = torch.nn.functional.normalize(torch.randn(1, 16), dim=-1).to(dtype)
    edits = build_edits([dict(stop=2, read=0, write=0, scale=1e6)])
    for _ in range(40):
        hidden = run(form, hidden, None, rows, edits)
    assert hidden.isfinite().all()
    assert torch.equal(hidden[2], bystander)


def test_not_a_number_stays_with_its_token(form):
    hidden = torch.randn(4, 8)
    hidden[1] = float("nan")
    rows = torch.randn(2, 8)
    edits = build_edits([dict(stop=4, read=0, write=1, threshold=0.0, scale=0.0, shift=1.0)])
    out = run(form, hidden, None, rows, edits)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


def test_op_edits_in_place_and_counts_runs():
    rows = torch.ones(1, 4)
    site = Site()
    bind_sites([site])
    hidden = torch.zeros(2, 4)
    apply_edits(hidden, None, 0)
    assert site.runs == 0
    assert torch.equal(hidden, torch.zeros(2, 4))
    site.edits = prepare_edits(build_edits([dict(start=1, stop=2, shift=2.0)]), rows)
    apply_edits(hidden, None, 0)
    assert site.runs == 1
    assert torch.equal(hidden, torch.tensor([[0.0] * 4, [2.0] * 4]))


def test_op_passes_opcheck():
    bind_sites([Site()])
    torch.library.opcheck(apply_edits.default, (torch.randn(3, 4), torch.randn(3, 4), 0))


def test_compiled_graph_holds_no_copy_of_the_stream():
    """The op must act on the producer's own buffer: a clone per layer would cost idle servers memory traffic."""
    from torch._inductor.utils import run_and_get_code

    def layer(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden = x @ weight
        apply_edits(hidden, residual, 0)
        return hidden + residual

    site = Site()
    site.edits = prepare_edits(build_edits([dict(stop=3, shift=2.0)]), torch.ones(1, 8))
    bind_sites([site])
    arguments = (torch.randn(3, 8), torch.randn(8, 8), torch.randn(3, 8))
    with torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(layer, dynamic=True), *arguments)
    assert torch.allclose(result, layer(*arguments), atol=1e-5)
    call = next(line for line in code.splitlines() if "steer_kernels.apply_edits" in line and "(" in line)
    buffer = call.split("(")[1].split(",")[0]
    producer = [line for line in code.splitlines() if "extern_kernels.mm(" in line and f"out={buffer}" in line]
    assert producer, f"the op does not run on the matmul's own output:\n{code}"
