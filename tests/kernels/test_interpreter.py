"""The Triton kernels without a GPU: the kernels' tests in a process where Triton interprets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETED

ROOT = Path(__file__).parents[2]
KERNELS = (
    "apply_edits",
    "gates",
    "encode_topk",
    "encode_topk_screened",
    "encode_threshold",
    "count_above",
    "count_above_screened",
    "decode_sparse",
)


@pytest.mark.interprets
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_in_the_interpreter():
    # One process for all: each would import torch and Triton anew.
    tests = [f"tests/kernels/test_{kernel}.py" for kernel in KERNELS] + [
        "tests/kernels/test_apply_edits_graph.py",
        "tests/kernels/test_whole_sae_graphs.py",
        "tests/engine/test_worker_steering.py",
        "tests/engine/test_kernel_test.py",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", "-W", "ignore", *tests],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    summary = result.stdout.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None
    assert int(passed[1]) >= 20 * len(KERNELS), "the tests must be there, and none left out"
    assert "skipped" not in summary
    assert "deselected" not in summary
