"""The Triton kernels without a GPU: the kernels' tests in a process where Triton interprets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETED

ROOT = Path(__file__).parents[2]


@pytest.mark.interprets
@pytest.mark.timeout(1800)
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("kernel", ["encode_topk", "encode_threshold", "count_above", "decode_sparse"])
def test_kernel_in_the_interpreter(kernel):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/test_{kernel}.py"],
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
    assert int(passed[1]) >= 20, "the tests must be there, and none left out"
    assert "skipped" not in summary
    assert "deselected" not in summary
