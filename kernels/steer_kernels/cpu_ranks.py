"""Ranks of features on a CPU, compiled by Numba, in the order of `pre_activations`.

Imported where it is first needed: it is compiled then, which takes a second.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

BLOCK = 64
"""Neighbouring features whose largest key is found first: where k blocks have one, the k-th largest of those is a bound
below which no feature is among the k."""

_LOWEST = np.int32(-(2**31))


@njit("void(int32[::1], int64[::1], int64, int64)")
def _sift_down(keys, features, place, size):
    """Restore a heap whose root comes after all others, below `place`. Of equal keys the higher feature comes after."""
    key, feature = keys[place], features[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (
            keys[other] < keys[child] or (keys[other] == keys[child] and features[other] > features[child])
        ):
            child = other
        if keys[child] > key or (keys[child] == key and features[child] < feature):
            break
        keys[place], features[place] = keys[child], features[child]
        place = child
    keys[place], features[place] = key, feature


@njit("int64(int32[::1], int64, int64, int32, int32[::1], int64[::1], int64, int64)", nogil=True)
def _hold(keys, start, stop, bound, held_keys, held, n_held, k):
    """Put what comes before the root of the heap, and is not below `bound`, in its place; how many are held then.

    Features come in order: of equals, those that are held are lower.
    """
    for feature in range(start, stop):
        key = keys[feature]
        if n_held < k:
            if key >= bound:
                held_keys[n_held], held[n_held] = key, feature
                n_held += 1
                if n_held == k:
                    for place in range(k // 2 - 1, -1, -1):
                        _sift_down(held_keys, held, place, k)
        elif key > held_keys[0]:
            held_keys[0], held[0] = key, feature
            _sift_down(held_keys, held, 0, k)
    return n_held


@njit("void(float32[:, ::1], int32[:, ::1], int64, boolean, float32[:, ::1], int64[:, ::1])", nogil=True)
def _first(pre_acts, bits, k, absolute, values, features):
    n, d_sae = bits.shape
    n_blocks = (d_sae + BLOCK - 1) // BLOCK
    keys, maxima = np.empty(d_sae, np.int32), np.empty(n_blocks, np.int32)
    held_keys, blocks = np.empty(k, np.int32), np.empty(k, np.int64)
    for token in range(n):
        for feature in range(d_sae):
            number = bits[token, feature]
            size = number & np.int32(0x7FFFFFFF)
            if absolute:
                number = size
            # Integers in the order of the numbers: of negative ones, whose sign is the highest bit, in reverse.
            key = number if number >= 0 else -size
            keys[feature] = _LOWEST if size > np.int32(0x7F800000) else key
        for block in range(n_blocks):
            largest = _LOWEST
            for feature in range(block * BLOCK, min((block + 1) * BLOCK, d_sae)):
                largest = max(largest, keys[feature])
            maxima[block] = largest
        bound = _LOWEST
        if n_blocks >= k:
            _hold(maxima, 0, n_blocks, _LOWEST, held_keys, blocks, 0, k)
            bound = held_keys[0]
        held, n_held = features[token], 0
        for block in range(n_blocks):
            if maxima[block] > held_keys[0] if n_held == k else maxima[block] >= bound:
                stop = min((block + 1) * BLOCK, d_sae)
                n_held = _hold(keys, block * BLOCK, stop, bound, held_keys, held, n_held, k)
        # The last goes to the end, and so on.
        for size in range(k - 1, 0, -1):
            held_keys[0], held_keys[size] = held_keys[size], held_keys[0]
            held[0], held[size] = held[size], held[0]
            _sift_down(held_keys, held, 0, size)
        for place in range(k):
            values[token, place] = pre_acts[token, held[place]]


def first_k(pre_acts: torch.Tensor, k: int, absolute: bool, values: torch.Tensor, features: torch.Tensor) -> None:
    """Write the k first features of pre_acts [n, d_sae] float32 to features [n, k] int64, and their p to values
    [n, k] float32, all with their rows together in memory."""
    _first(pre_acts.numpy(), pre_acts.view(torch.int32).numpy(), k, absolute, values.numpy(), features.numpy())


@njit("void(float32[:, ::1], int64[:, ::1], boolean[:, ::1], int32[:, ::1])", nogil=True)
def _ahead(ranked, features, counted, ahead):
    for token in range(len(ranked)):
        row = ranked[token]
        for column in range(features.shape[1]):
            if counted[token, column]:
                own_feature = features[token, column]
                own, n = row[own_feature], np.int32(0)
                # Of equals the lower is ahead.
                for feature in range(own_feature):
                    n += row[feature] >= own
                for feature in range(own_feature + 1, len(row)):
                    n += row[feature] > own
                ahead[token, column] = n


def count_ahead(
    ranked: torch.Tensor, features: torch.Tensor, counted: torch.Tensor | None, ahead: torch.Tensor
) -> None:
    """Write to ahead [n, m] int32, where counted [n, m] (None: everywhere), how many of ranked [n, d_sae] float32 come
    before each of features [n, m] int64 of its row."""
    counted = torch.ones_like(ahead, dtype=torch.bool) if counted is None else counted
    _ahead(ranked.contiguous().numpy(), features.contiguous().numpy(), counted.contiguous().numpy(), ahead.numpy())
