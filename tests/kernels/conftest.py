"""Where the whole-SAE kernels run in this process.

`device` is "cpu" for the CPU path, "cuda" where there is a GPU, "interpreter" for the Triton kernels in Triton's own
interpreter. That one is chosen when Triton is imported and for the whole process, so `test_interpreter.py` starts
another process for it, in which the same tests run on nothing else.
"""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["interpreter"] if INTERPRETED else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


def pytest_collection_modifyitems(config, items):
    """What only Triton's launchers can show is left to the interpreter's process where there is no GPU, and to that
    process nothing else."""
    if INTERPRETED:
        runs_kernels = {"device", "triton_device", "form"}
        items[:] = [i for i in items if i.path.parent != HERE or runs_kernels & set(getattr(i, "fixturenames", ()))]
    if DEVICES == ["cpu"]:
        left = [item for item in items if "triton_device" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture
def triton_device() -> str:
    """The torch device that Triton's launchers take here."""
    return "cpu" if INTERPRETED else "cuda"
