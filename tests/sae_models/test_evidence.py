from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_models.features.evidence import (
    WINDOW_AFTER,
    WINDOW_BEFORE,
    Histogram,
    PairCounts,
    Strongest,
    Tally,
    automatic_label,
    folded_unembedding,
    informative,
    mutual_information,
    vocabulary_projection,
)
from sae_models.features.feature import QUANTILES, Feature, TokenScore


def test_quantiles_are_right_within_one_percent():
    generator = np.random.default_rng(0)
    values = {0: generator.lognormal(2, 1.5, 5000), 2: generator.uniform(0.001, 3000, 37), 3: np.array([7.0])}
    histogram = Histogram(4)
    for feature, drawn in values.items():
        for part in np.array_split(drawn, 3):
            histogram.add(torch.full((len(part),), feature), torch.from_numpy(part.astype(np.float32)))
    for feature, drawn in values.items():
        exact = np.quantile(drawn, QUANTILES, method="inverted_cdf")
        assert histogram.quantiles(feature) == pytest.approx(exact, rel=0.0101)
    assert histogram.quantiles(1) == ()


def test_values_beyond_the_bins_are_counted_in_the_outermost():
    histogram = Histogram(1)
    histogram.add(torch.zeros(4, dtype=torch.long), torch.tensor([1e-9, 1e-9, 1e9, 1e9]))
    quantiles = histogram.quantiles(0)
    assert quantiles[0] == quantiles[1] == pytest.approx(Histogram.LOWEST, rel=0.02)
    assert quantiles[2] == quantiles[-1] == pytest.approx(Histogram.HIGHEST, rel=0.03)


@pytest.mark.parametrize("buffer", [1, 50, 10**6])
def test_pairs_are_counted_whatever_the_buffer(buffer, monkeypatch):
    monkeypatch.setattr(PairCounts, "BUFFER", buffer)
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, high, size) for high, size in ((40, 30), (10, 0), (90, 200), (300, 70), (90, 5))]
    counts = PairCounts()
    for part in parts:
        counts.add(part)
    keys, found = counts.result()
    assert list(keys) == sorted(keys)
    assert dict(zip(keys.tolist(), found.tolist(), strict=True)) == Counter(np.concatenate(parts).tolist())


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mutual_information_is_the_entropies_that_are_saved(positions):
    """I(X; Y) = H(X) + H(Y) - H(X, Y), of the positions themselves."""

    def entropy(items):
        p = np.array(list(Counter(items).values())) / len(items)
        return -(p * np.log2(p)).sum()

    active, token = zip(*positions, strict=True)
    together = sum(a and t for a, t in positions)
    bits = mutual_information(np.array([together]), np.array([sum(active)]), np.array([sum(token)]), len(positions))
    assert bits[0] == pytest.approx(entropy(active) + entropy(token) - entropy(positions), abs=1e-9)


def random_chunks(d_sae, vocabulary, count=30):
    """(ids, used, activations): sparse, few values, texts that come again and again."""
    generator = np.random.default_rng(0)
    opening = generator.integers(0, vocabulary, 6)
    for chunk in range(count):
        ids = generator.integers(0, vocabulary, int(generator.integers(8, 60)))
        if chunk % 3 == 0:
            ids[:6] = opening
        used = np.arange(len(ids)) > 0
        acts = generator.lognormal(0, 1, (len(ids), d_sae)) * (generator.random((len(ids), d_sae)) < 0.2)
        # The third feature is about token 2, the last one never active, the openings equal but for rounding.
        acts[:, 3] = generator.random(len(ids)) * (ids == 2)
        acts[:, -1] = 0
        if chunk % 3 == 0:
            acts[5, 1] = 50 + chunk / 100
        acts[0] = 0
        yield ids, used, torch.from_numpy(acts.astype(np.float32))


@pytest.mark.parametrize("keep", [1, 4, 50])
def test_the_strongest_contexts_are_one_per_chunk_and_no_text_twice(keep):
    d_sae = 7
    chunks = list(random_chunks(d_sae, 5000))
    strongest = Strongest(d_sae, keep)
    for chunk, (ids, _, acts) in enumerate(chunks):
        strongest.add(chunk, ids, acts)
    for feature in range(d_sae):
        best = {}
        for chunk, (ids, _, acts) in enumerate(chunks):
            position = int(acts[:, feature].argmax())
            value = float(acts[position, feature])
            text = tuple(ids[max(0, position - WINDOW_BEFORE) : position + 1])
            if value > 0 and value > best.get(text, (0,))[0]:
                best[text] = (value, chunk, position)
        expected = sorted(best.values(), reverse=True)[:keep]
        found = strongest.of(feature)
        assert [(peak.value, peak.chunk, peak.position) for peak in found] == expected
        for peak in found:
            acts = chunks[peak.chunk][2][:, feature]
            start, stop = max(0, peak.position - 31), min(len(acts), peak.position + WINDOW_AFTER + 1)
            assert peak.around(start, stop) == pytest.approx(acts[start:stop].tolist(), rel=1e-3)
    # Ten chunks open alike.
    assert len([peak for peak in strongest.of(1) if peak.value >= 50]) == 1


@pytest.mark.parametrize("top", [2, 100])
def test_informative_tokens_are_those_of_the_contingency_tables(top):
    d_sae, vocabulary = 7, 12
    chunks = list(random_chunks(d_sae, vocabulary))
    tally = Tally(d_sae, vocabulary, contexts=2)
    for chunk, (ids, used, acts) in enumerate(chunks):
        tally.add(chunk, ids, used, acts)
    listed = np.arange(vocabulary) != 5
    found = informative(tally, listed, top)

    ids = np.concatenate([ids[used] for ids, used, _ in chunks])
    acts = torch.cat([acts[torch.from_numpy(used)] for _, used, acts in chunks]).numpy()
    assert tally.tokens == len(ids)
    assert tally.active.tolist() == (acts > 0).sum(axis=0).tolist()
    assert tally.maximum.tolist() == acts.max(axis=0).tolist()
    for feature in range(d_sae):
        expected = {}
        for token in set(range(vocabulary)) - {5}:
            table = np.array(
                [[((acts[:, feature] > 0) == a)[(ids == token) == t].sum() for t in (1, 0)] for a in (1, 0)]
            )
            p = table / len(ids)
            independent = p.sum(axis=1, keepdims=True) * p.sum(axis=0)
            if table[0, 0] >= 3 and p[0, 0] > independent[0, 0]:
                inside = table > 0
                expected[token] = (p[inside] * np.log2(p[inside] / independent[inside])).sum()
        said = slice(found.starts[feature], found.starts[feature + 1])
        best = sorted(expected.values(), reverse=True)[:top]
        assert found.bits[said].tolist() == pytest.approx(best)
        assert [expected[token] for token in found.tokens[said].tolist()] == pytest.approx(best)
    assert found.tokens[found.starts[3]] == 2
    assert found.starts[d_sae] == found.starts[d_sae - 1]


@pytest.mark.parametrize("centres", [False, True])
def test_the_vocabulary_projection_is_the_product_of_norm_and_unembedding(centres):
    torch.manual_seed(0)
    d_in, vocabulary = 16, 50
    decoder, unembedding, gain = torch.randn(5, d_in), torch.randn(vocabulary, d_in), torch.rand(d_in) + 0.5
    raised, lowered = vocabulary_projection(decoder, folded_unembedding(unembedding, gain, centres), 4)
    x = decoder.double()
    if centres:
        x = x - x.mean(dim=1, keepdim=True)
    logits = (x * gain) @ unembedding.double().T
    logits -= logits.mean(dim=1, keepdim=True)
    for most, found in ((logits.sort(descending=True), raised), (logits.sort(), lowered)):
        assert found.tokens.tolist() == most.indices[:, :4].tolist()
        np.testing.assert_allclose(found.logits, most.values[:, :4], atol=1e-4)


def scored(*tokens):
    return tuple(TokenScore(token, 1.0) for token in tokens)


@pytest.mark.parametrize(
    ("informative_tokens", "raised", "density", "label"),
    [
        ((" sea", "Sea", "ocean", "\n", " waves", "a", "b", "c"), ("d",), 0.1, "tokens: sea, ocean, waves, a, b"),
        ((" sea",), (" SEA", " coast", "a", "b"), 0.1, "tokens: sea, coast, a"),
        ((), ("coast",), 0.1, "tokens: coast"),
        ((" ",), (), 0.1, "no tokens stand out"),
        (("sea",), ("coast",), 0.0, "never active in the evidence"),
    ],
)
def test_the_automatic_label_is_made_of_the_top_tokens(informative_tokens, raised, density, label):
    feature = Feature(
        index=0,
        density=density,
        max_activation=1.0,
        decoder_norm=1.0,
        informative=scored(*informative_tokens),
        raised=scored(*raised),
    )
    assert automatic_label(feature) == label
