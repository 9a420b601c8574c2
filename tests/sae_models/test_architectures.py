"""Every architecture: its canonical form against its published definition."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sae_models.architectures import ENCODERS, SAME_AT_INFERENCE, TRANSCODERS, skip_transcoder, topk, transcoder
from sae_models.folding import scaled
from sae_models.selection import Selection
from tests.sae_models.architecture_cases import CASES, D_SAE, Draw
from tests.sae_models.in_memory import decode, encode, sae_of

SEEDS = st.integers(0, 2**31)
IDENTITY = torch.eye(D_SAE, dtype=torch.float64)


def canonical(name, case):
    """An SAE whose input is q = z @ W_enc itself, with this activation; scores come in behind it where routed."""
    activation = ENCODERS[name].canonical(**case.canonical)
    if case.scores is None:
        return sae_of(IDENTITY, IDENTITY, torch.zeros(D_SAE, dtype=torch.float64), activation)
    groups = case.scores.shape[1]
    W = torch.cat([torch.zeros(D_SAE, groups), torch.eye(groups)]).double()
    W_enc = torch.cat([IDENTITY, torch.zeros(groups, D_SAE, dtype=torch.float64)])
    router = (W, torch.zeros(groups, dtype=torch.float64))
    return sae_of(W_enc, IDENTITY, torch.zeros(D_SAE, dtype=torch.float64), activation, router=router)


def both(name, seed, grid, q=None):
    """(canonical, defined) activations of q [n, d_sae], and the case."""
    draw = Draw(seed, grid)
    case = CASES[name](draw)
    q = draw(draw.n, D_SAE) if q is None else q.expand(draw.n, D_SAE)
    x = q if case.scores is None else torch.cat([q, case.scores], dim=1)
    return encode(canonical(name, case), x), ENCODERS[name].activations(q, **case.defining), case


def test_every_architecture_is_here():
    assert set(CASES) == set(ENCODERS)
    assert set(SAME_AT_INFERENCE.values()) <= set(ENCODERS)
    assert {"transcoder", "skip_transcoder"} <= set(TRANSCODERS)


@pytest.mark.parametrize("name", ENCODERS)
@given(SEEDS)
def test_random_inputs(name, seed):
    ours, defined, _ = both(name, seed, grid=False)
    assert torch.equal(ours != 0, defined != 0)
    assert float((ours - defined).abs().max()) <= 1e-12


@pytest.mark.parametrize("name", ENCODERS)
@given(SEEDS)
def test_exact_thresholds_ties_and_zeros(name, seed):
    """Nothing is rounded here, so that what is off by one comparison is off by a whole activation."""
    ours, defined, case = both(name, seed, grid=True)
    if not case.tied:
        assert torch.equal(ours, defined)
        return
    # The definition may keep any of those that are equal; what survives is as large.
    ours_kept, defined_kept = (acts.sort(dim=-1).values for acts in (ours.abs(), defined.abs()))
    assert torch.allclose(ours_kept, defined_kept, atol=1e-12, rtol=0)


VALUES = (0.0, -0.0, 1e-300, -1e-300, 1e300)


# A gate is compared where its magnitude is, which rounds an opening of 1e-300 away.
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in ENCODERS for value in VALUES if (name, value) != ("gated", 1e-300)]
)
def test_one_value_everywhere(name, value):
    for seed in range(20):
        ours, defined, case = both(name, seed, grid=True, q=torch.full((1, D_SAE), value, dtype=torch.float64))
        if not case.tied:
            assert torch.equal(ours, defined)
        assert torch.equal((ours != 0).sum(-1), (defined != 0).sum(-1))


@given(SEEDS, st.sampled_from([1, 2, 3, 6]), st.booleans())
@example(0, 1, True)
def test_of_equals_the_lower_index_is_kept(seed, groups, absolute):
    draw = Draw(seed, grid=True)
    size = D_SAE // groups
    k = draw.among(*range(1, size + 1))
    pre_acts = draw(draw.n, D_SAE)
    kept = Selection(k, groups, absolute).keep(pre_acts)
    ranked = pre_acts.abs() if absolute else pre_acts
    for row in range(draw.n):
        for group in range(groups):
            features = range(group * size, (group + 1) * size)
            first = sorted(features, key=lambda i, r=row: (-float(ranked[r, i]), i))[:k]
            assert kept[row, list(features)].nonzero().flatten().tolist() == sorted(i - group * size for i in first)


@given(SEEDS, st.floats(0.1, 10))
def test_topk_that_ranks_by_decoder_norms(seed, factor):
    """SAELens' `rescale_acts_by_decoder_norm`: activations are in units of what they write; the rows have norm 1."""
    draw = Draw(seed, grid=False)
    q, b_enc, W_dec, k = draw(draw.n, D_SAE), draw(D_SAE), draw(D_SAE, 5), 3
    output_map = scaled(factor)
    norms = (W_dec * factor).norm(dim=-1)
    pre_acts = (q + b_enc) * norms
    top = pre_acts.topk(k, dim=-1)
    defined = torch.zeros_like(pre_acts).scatter(-1, top.indices, torch.relu(top.values))
    activation = topk.canonical(b_enc, k, rescale_by_decoder_norm=True)
    sae = sae_of(IDENTITY, W_dec, torch.zeros(5, dtype=torch.float64), activation, output_map=output_map)
    ours = encode(sae, q)
    assert float((ours - defined).abs().max()) <= 1e-9
    expected = (defined / norms) @ W_dec * factor
    assert float((decode(sae, ours, q) - expected).abs().max()) <= 1e-9


@given(SEEDS)
def test_transcoders(seed):
    draw = Draw(seed, grid=False)
    acts, W_dec, b_dec, x, W_skip = draw(4, D_SAE), draw(D_SAE, 5), draw(5), draw(4, 7), draw(5, 7)
    activation = ENCODERS["relu"].canonical(draw(D_SAE))
    plain = sae_of(draw(7, D_SAE), W_dec, b_dec, activation)
    assert torch.allclose(decode(plain, acts, x), transcoder.reconstruction(acts, W_dec, b_dec), atol=1e-12)
    skip = sae_of(draw(7, D_SAE), W_dec, b_dec, activation, W_skip=W_skip)
    expected = skip_transcoder.reconstruction(acts, W_dec, b_dec, x, W_skip)
    assert torch.allclose(decode(skip, acts, x), expected, atol=1e-12)
