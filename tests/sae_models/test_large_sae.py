"""Rows, not files: what a large SAE costs a process does not grow with its files.

The full size, with times, is `benchmarks/large_sae.py`; here a sixth of it.
"""

import tempfile
from pathlib import Path

import pytest

from benchmarks.large_sae import GOAL_BYTES, used, write_large_sae

FEATURES = [0, 1, 999, 40_000, 77_777, 99_999, 131_070, 131_071]
FULL_BYTES = 2 * 131_072 * 4096 * 2
D_IN = 640


@pytest.fixture(scope="module")
def runs():
    """(bytes of the weights, bytes of what was cached, first use, second use)."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary) / "sae", Path(temporary) / "cache"
        folder.mkdir()
        size = write_large_sae(folder, D_IN, 131_072)
        first, second = (used(folder, FEATURES, cache) for _ in range(2))
        cached = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        yield size, cached, first, second


def test_memory(runs):
    size, _, first, second = runs
    # Checking and transposing go block by block, whatever the size.
    assert first["peak_added_bytes"] < GOAL_BYTES
    assert second["peak_added_bytes"] < GOAL_BYTES * size / FULL_BYTES


def test_later_uses_read_headers_vectors_and_rows(runs):
    size, cached, first, second = runs
    rows, vectors = 2 * len(FEATURES) * D_IN * 2, (131_072 * 2 + D_IN) * 2
    assert second["read_bytes"] < 2 * (rows + vectors) < size / 100
    assert first["read_bytes"] > 2 * size
    w_enc = 131_072 * D_IN * 2
    assert w_enc < cached < 1.001 * w_enc, "W_enc once more, as rows"
    assert first["checksum"] == second["checksum"]
