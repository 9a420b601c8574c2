"""The V2 model runner without a GPU: `runner_v2_*cases.py`, each where Triton interprets vLLM's kernels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

E2E = Path(__file__).parent
ROOT = E2E.parents[1]


CASES = {
    "runner_v2_cases.py": 10,
    "runner_v2_drafts_cases.py": 3,
    "runner_v2_stages_cases.py": 1,
    "runner_v2_hybrid_cases.py": 1,
}
"""Files, and how many tests they have at least."""


REPLAYED = ("runner_v2_cases.py", "runner_v2_drafts_cases.py")
"""Those whose decode steps are replayed from CUDA graphs, as `interpreted/emulated_graphs.py` has them. Pipeline stages
run the op between pieces, and Mamba's metadata is beyond it."""


@pytest.mark.engine
@pytest.mark.parametrize("cases", CASES)
def test_the_v2_runner(cases):
    environment = {
        "PYTHONPATH": os.pathsep.join([str(E2E / "interpreted"), os.environ.get("PYTHONPATH", "")]),
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "EMULATED_CUDA_GRAPHS": "1" if cases in REPLAYED else "0",
        # A function of the test's own, sent to the worker.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(E2E / cases)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    summary = result.stdout.strip().splitlines()[-1]
    passed = re.match(r"(\d+) passed", summary)
    assert passed is not None
    assert int(passed[1]) >= CASES[cases]
    assert "skipped" not in summary
