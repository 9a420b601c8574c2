"""The package's own names."""

import subprocess
import sys

import pytest

import steer_server


def test_importing_the_package_imports_no_engine():
    code = "import sys, steer_server; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names():
    from steer_server.llm import SteeredLLM

    assert steer_server.SteeredLLM is SteeredLLM
    with pytest.raises(AttributeError, match="no attribute 'Steered'"):
        steer_server.Steered  # noqa: B018
