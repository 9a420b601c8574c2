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
    environment = {
        "PYTHONPATH": os.pathsep.join([str(E2E / "interpreted"), os.environ.get("PYTHONPATH", "")]),
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        # A function of the test's own, sent to the worker.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(E2E / "runner_v2_cases.py")],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    summary = result.stdout.strip().splitlines()[-1]
    assert re.match(r"\d+ passed", summary)
    assert "skipped" not in summary
