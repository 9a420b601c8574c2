"""What tells what a feature means, in numbers and token ids.

Statistics of its activations over text, and its decoder row read through the unembedding. What ran the model and what
the tokens are as text is known elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sae_models.features.feature import QUANTILES, Feature

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

WINDOW_BEFORE, WINDOW_AFTER = 24, 8
"""Tokens of a context on both sides of its peak."""
SPAN_LENGTHS = (1, 2, 4, 8, 16, 32)
SPAN_SHARE = 0.8
"""A span is minimal when it is the shortest of SPAN_LENGTHS that alone gives this share of the peak's activation."""
SINK_NORM = 10.0
"""Tokens whose norm is over so many times the median are attention sinks in mid-sequence, which SAEs are not trained on
(Sun et al. 2024, "Massive Activations in Large Language Models")."""
MIN_TOGETHER = 3
"""A token must be met with a feature so often before it may be informative: fewer are chance."""
LABEL_TOKENS, LABEL_FILLED = 5, 3
"""Tokens of an automatic label at most; raised tokens only make up for missing informative ones, to so many in all: in
middle layers they say little."""

# Activations are kept back to the longest span, so that a context can be widened to hold it.
_BACK = max(WINDOW_BEFORE, SPAN_LENGTHS[-1] - 1)


class Histogram:
    """Positive activations of each feature in bins 2 % wide, so that quantiles are right within 1 %.

    What lies outside of [LOWEST, HIGHEST] is counted in the outermost bins.
    """

    LOWEST, HIGHEST, RATIO = 1e-4, 1e5, 1.02

    def __init__(self, d_sae: int) -> None:
        self._log_ratio = float(np.log(self.RATIO))
        self._bins = int(np.log(self.HIGHEST / self.LOWEST) / self._log_ratio) + 1
        self._counts = torch.zeros(d_sae * self._bins, dtype=torch.int32)

    def add(self, features: torch.Tensor, values: torch.Tensor) -> None:
        """features: int64 [n]. values: float32 [n], positive."""
        bins = ((values / self.LOWEST).log() / self._log_ratio).long().clamp(0, self._bins - 1)
        self._counts.index_add_(0, features * self._bins + bins, torch.ones(len(bins), dtype=torch.int32))

    def quantiles(self, feature: int) -> tuple[float, ...]:
        """QUANTILES of the feature's positive activations, each the middle of its bin; empty where there is none."""
        counts = self._counts[feature * self._bins : (feature + 1) * self._bins].numpy().cumsum(dtype=np.int64)
        if counts[-1] == 0:
            return ()
        bins = np.searchsorted(counts, np.ceil(np.array(QUANTILES) * counts[-1]))
        return tuple(float(value) for value in self.LOWEST * np.exp((bins + 0.5) * self._log_ratio))


class PairCounts:
    """How often each (feature, token) was met, sparse: memory grows with the pairs that occur."""

    BUFFER = 4_000_000

    def __init__(self) -> None:
        self._keys: Ints = np.empty(0, dtype=np.int64)
        self._counts: Ints = np.empty(0, dtype=np.int64)
        self._pending: list[Ints] = []
        self._pending_size = 0

    def add(self, keys: Ints) -> None:
        """keys: [n], one for each meeting."""
        self._pending.append(keys)
        self._pending_size += len(keys)
        # Merging costs as much as what is there already: with a buffer of that size it stays linear in all.
        if self._pending_size > max(self.BUFFER, len(self._keys)):
            self._merge()

    def result(self) -> tuple[Ints, Ints]:
        """(keys ascending, counts), both [number of distinct keys]."""
        self._merge()
        return self._keys, self._counts

    def _merge(self) -> None:
        if not self._pending:
            return
        new_keys, new_counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending, self._pending_size = [], 0
        places = np.searchsorted(self._keys, new_keys)
        known = np.zeros(len(new_keys), dtype=bool)
        inside = places < len(self._keys)
        known[inside] = self._keys[places[inside]] == new_keys[inside]
        self._counts[places[known]] += new_counts[known]
        self._keys = np.insert(self._keys, places[~known], new_keys[~known])
        self._counts = np.insert(self._counts, places[~known], new_counts[~known])


@dataclass(frozen=True)
class Peak:
    """Where a feature was strong: token `position` of chunk `chunk`.

    window: activations float32 [_BACK + 1 + WINDOW_AFTER] around the position, zero beyond the chunk.
    """

    value: float
    chunk: int
    position: int
    window: NDArray[np.float32]

    def around(self, start: int, stop: int) -> tuple[float, ...]:
        """Activations of tokens [start, stop) of the chunk, four digits of each."""
        first = self.position - _BACK
        return tuple(four_digits(value) for value in self.window[start - first : stop - first])


class Strongest:
    """The strongest peaks of each feature: one per chunk, and one of those whose text up to the peak is the same.

    What follows the peak has no part in its activation, so contexts that differ only there are one context.
    """

    def __init__(self, d_sae: int, keep: int) -> None:
        self._values = np.zeros((d_sae, keep), dtype=np.float32)
        self._chunks = np.zeros((d_sae, keep), dtype=np.int64)
        self._positions = np.zeros((d_sae, keep), dtype=np.int64)
        self._texts = np.zeros((d_sae, keep), dtype=np.int64)
        self._windows = np.zeros((d_sae, keep, _BACK + 1 + WINDOW_AFTER), dtype=np.float32)

    def add(self, chunk: int, ids: Ints, acts: torch.Tensor) -> None:
        """acts: float32 [len(ids), d_sae] of one chunk."""
        best = acts.max(dim=0)
        features = np.flatnonzero(best.values.numpy() > self._values.min(axis=1))
        values, positions = best.values.numpy()[features], best.indices.numpy()[features]
        distinct, inverse = np.unique(positions, return_inverse=True)
        texts = np.array([hash(ids[max(0, p - WINDOW_BEFORE) : p + 1].tobytes()) for p in distinct], dtype=np.int64)
        texts = texts[inverse]

        same = (self._texts[features] == texts[:, None]) & (self._values[features] > 0)
        slots = np.where(same.any(axis=1), same.argmax(axis=1), self._values[features].argmin(axis=1))
        better = values > self._values[features, slots]
        features, slots, values, positions = features[better], slots[better], values[better], positions[better]
        places = positions[:, None] + np.arange(-_BACK, WINDOW_AFTER + 1)
        inside = (places >= 0) & (places < len(ids))
        around = acts.numpy()[np.where(inside, places, 0), features[:, None]]
        self._values[features, slots] = values
        self._chunks[features, slots] = chunk
        self._positions[features, slots] = positions
        self._texts[features, slots] = texts[better]
        self._windows[features, slots] = np.where(inside, around, 0.0)

    def of(self, feature: int) -> list[Peak]:
        """Strongest first."""
        order = np.argsort(-self._values[feature], kind="stable")
        return [
            Peak(
                float(self._values[feature, slot]),
                int(self._chunks[feature, slot]),
                int(self._positions[feature, slot]),
                self._windows[feature, slot],
            )
            for slot in order
            if self._values[feature, slot] > 0
        ]


class Tally:
    """Everything that is counted while text is read. Memory does not grow with the text, but for the pairs of feature
    and token."""

    def __init__(self, d_sae: int, vocabulary: int, contexts: int) -> None:
        """vocabulary: token ids are below it. contexts: how many to keep of each feature."""
        self.d_sae, self.vocabulary = d_sae, vocabulary
        self.tokens = 0
        self.active: Ints = np.zeros(d_sae, dtype=np.int64)
        self.token_counts: Ints = np.zeros(vocabulary, dtype=np.int64)
        self.maximum = torch.zeros(d_sae)
        self.histogram = Histogram(d_sae)
        self.pairs = PairCounts()
        self.strongest = Strongest(d_sae, contexts)

    def add(self, chunk: int, ids: Ints, used: NDArray[np.bool_], acts: torch.Tensor) -> None:
        """Count one chunk. used: [len(ids)], which tokens count. acts: float32 [len(ids), d_sae], zero where not."""
        self.tokens += int(used.sum())
        self.token_counts += np.bincount(ids[used], minlength=self.vocabulary)
        # numpy finds what is not zero several times as fast as torch on a CPU.
        flat = np.flatnonzero(acts.numpy())
        positions, features = np.divmod(flat, self.d_sae)
        values = acts.view(-1)[torch.from_numpy(flat)]
        self.active += np.bincount(features, minlength=self.d_sae)
        self.maximum = torch.maximum(self.maximum, acts.amax(dim=0))
        self.histogram.add(torch.from_numpy(features), values)
        self.pairs.add(features * self.vocabulary + ids[positions])
        self.strongest.add(chunk, ids, acts)


@dataclass(frozen=True)
class Informative:
    """The most informative tokens of all features, one after the other.

    starts: [d_sae + 1], feature i has [starts[i], starts[i + 1]). tokens: ids. bits: mutual information, falling.
    """

    starts: Ints
    tokens: Ints
    bits: Floats


def mutual_information(together: Ints, active: Ints, token: Ints, tokens: int) -> Floats:
    """Bits that "the feature is active here" and "this is the token" say of each other, elementwise.

    together: positions where both hold. active, token: where one does. tokens: all positions. Source: the definition,
    sum of p(x, y) log2 (p(x, y) / p(x) p(y)) over the four cells of the contingency table.
    """
    bits: Floats = np.zeros(np.broadcast_shapes(together.shape, active.shape, token.shape))
    for joint, a, b in (
        (together, active, token),
        (active - together, active, tokens - token),
        (token - together, tokens - active, token),
        (tokens - active - token + together, tokens - active, tokens - token),
    ):
        # An empty cell adds nothing.
        ratio = np.maximum(joint, 1) * float(tokens) / np.maximum(a.astype(np.float64) * b, 1.0)
        bits += joint / tokens * np.log2(ratio)
    return bits


def informative(tally: Tally, listed: NDArray[np.bool_], top: int) -> Informative:
    """The `top` most informative of the tokens on which each feature is more often active than elsewhere, met with it
    at least MIN_TOGETHER times. listed: [vocabulary], which tokens may be named."""
    keys, together = tally.pairs.result()
    often = together >= MIN_TOGETHER
    keys, together = keys[often], together[often]
    features, tokens = np.divmod(keys, tally.vocabulary)
    active, token = tally.active[features], tally.token_counts[tokens]
    positive = (together * tally.tokens > active * token) & listed[tokens]
    features, tokens = features[positive], tokens[positive]
    bits = mutual_information(together[positive], active[positive], token[positive], tally.tokens)
    order = np.lexsort((tokens, -bits, features))
    features, tokens, bits = features[order], tokens[order], bits[order]
    first = np.searchsorted(features, np.arange(tally.d_sae))
    kept = np.arange(len(features)) - first[features] < top
    starts = np.searchsorted(features[kept], np.arange(tally.d_sae + 1)).astype(np.int64)
    return Informative(starts, tokens[kept], bits[kept])


def folded_unembedding(unembedding: torch.Tensor, gain: torch.Tensor, centres: bool) -> torch.Tensor:
    """The unembedding [vocabulary, d_in] with the final norm in it, and centred over the vocabulary.

    gain: [d_in], what the norm multiplies with. centres: whether it takes the mean away first, as LayerNorm does.
    """
    folded = unembedding * gain
    if centres:
        folded = folded - folded.mean(dim=1, keepdim=True)
    return folded - folded.mean(dim=0)


@dataclass(frozen=True)
class TopLogits:
    """The tokens whose logits change most, for each of n decoder rows. tokens, logits: [n, top], most first."""

    tokens: Ints
    logits: NDArray[np.float32]


def vocabulary_projection(decoder: torch.Tensor, unembedding: torch.Tensor, top: int) -> tuple[TopLogits, TopLogits]:
    """(raised, lowered) by decoder rows [n, d_in] that write one unit of activation, but for the final norm's scale.

    unembedding: [vocabulary, d_in], of `folded_unembedding`. Source: nostalgebraist's logit lens (2020); "VocabProj" of
    Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions".
    """
    logits = decoder @ unembedding.T
    top = min(top, logits.shape[1])
    raised, lowered = logits.topk(top), logits.topk(top, largest=False)
    return (
        TopLogits(raised.indices.cpu().numpy(), raised.values.cpu().numpy()),
        TopLogits(lowered.indices.cpu().numpy(), lowered.values.cpu().numpy()),
    )


def four_digits(value: float) -> float:
    """`value` to four significant digits: more would make files larger and say nothing."""
    return float(f"{value:.4g}")


def automatic_label(feature: Feature) -> str:
    """A label of the feature's top tokens: what it is active at, then what it raises."""
    if feature.density == 0:
        return "never active in the evidence"
    words: dict[str, str] = {}
    for scores, most in ((feature.informative, LABEL_TOKENS), (feature.raised, LABEL_FILLED)):
        for score in scores:
            word = score.token.strip()
            if word and len(words) < most:
                words.setdefault(word.casefold(), word)
    return f"tokens: {', '.join(words.values())}" if words else "no tokens stand out"
