"""The V2 model runner without a GPU: `runner_v2_cases.py` in a process where Triton interprets vLLM's kernels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

E2E = Path(__file__).parent
ROOT = E2E.parents[1]


@pytest.mark.engine
def test_the_v2_runner():
    path = os.pathsep.join([str(E2E / "interpreted"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(E2E / "runner_v2_cases.py")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "VLLM_USE_V2_MODEL_RUNNER": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.fullmatch(r"\d passed in .*", result.stdout.strip().splitlines()[-1])
