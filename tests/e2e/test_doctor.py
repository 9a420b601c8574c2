"""The self-test inside of real engines: it passes on both kinds of decoder layer and stops a server that lies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.tiny_models import DUMMY, GPT2, LLAMA, tiny

pytestmark = pytest.mark.engine


def doctor(*arguments, environment=None):
    command = [sys.executable, "-m", "steer_server.cli", "doctor", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False, env=os.environ | (environment or {})
    )


def test_layers_that_return_one_tensor(tmp_path):
    """GPT-2's blocks return the stream itself; the other tests' Llama returns (hidden, residual)."""
    run = doctor(tiny(tmp_path / "gpt2", GPT2), *DUMMY, "--enforce-eager", "--json")
    assert run.returncode == 0, run.stderr[-3000:]
    checks = json.loads(run.stdout.strip().splitlines()[-1])
    assert [check["layer"] for check in checks] == [0, 1]
    assert all(check["passed"] and check["error"] <= check["allowed"] for check in checks)


def test_a_compiled_model_that_is_given_embeddings(tmp_path):
    """vLLM compiles it for embeddings instead of ids, as it does all multimodal models."""
    run = doctor(tiny(tmp_path / "llama", LLAMA), *DUMMY, "--enable-prompt-embeds", "--json")
    assert run.returncode == 0, run.stderr[-3000:]
    checks = json.loads(run.stdout.strip().splitlines()[-1])
    assert [check["layer"] for check in checks] == [0, 1, 2]
    assert all(check["passed"] and check["compiled_error"] < 1e-3 for check in checks)


def test_a_layer_that_only_pretends_stops_the_server(tmp_path):
    """`steer-server doctor` and the server share the start-up that refuses."""
    sabotage = {"PYTHONPATH": str(Path(__file__).parent / "sabotage")}
    run = doctor(tiny(tmp_path / "llama", LLAMA), *DUMMY, "--enforce-eager", environment=sabotage)
    assert run.returncode != 0
    assert "steering self-test failed" in run.stdout + run.stderr
    assert "layer 1: off by" in run.stdout + run.stderr
