"""Where the whole-SAE kernels run in this process.

`device` is "cpu" for the CPU path, "cuda" where there is a GPU, "interpreter" for the Triton kernels in Triton's own
interpreter. That one is chosen when Triton is imported and for the whole process, so `test_interpreter.py` starts
another process for it, in which the same tests run on nothing else.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from wrapt.importer import register_post_import_hook

from steer_kernels.apply_edits import torch_path

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["interpreter"] if INTERPRETED else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
FORMS = ["torch", "compiled"] if DEVICES == ["cpu"] else ["rows", "blocks"]


def add_up_in_one_order(interpreter):
    """An element of a GPU's matrix product is added up in the same order wherever it is in its tile, and kernels that
    compute it twice rely on that. BLAS, which the interpreter calls, promises no such thing."""

    by_blas = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.primitive_bitwidth == 8 or b.dtype.primitive_bitwidth == 8:
            return by_blas(self, a, b, d, input_precision, max_num_imprecise_acc)
        total = np.zeros(d.data.shape, dtype=d.data.dtype)
        for inner in range(a.data.shape[-1]):
            total += a.data[..., inner, None].astype(total.dtype) * b.data[..., inner, None, :].astype(total.dtype)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    register_post_import_hook(add_up_in_one_order, "triton.runtime.interpreter")


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


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Where edits are applied: by the torch path, alone or with the kernel that is compiled for CPUs; or by the Triton
    kernel, in its row form alone or with its grouped form wherever tokens share their edits."""
    if request.param == "torch":
        monkeypatch.setattr(torch_path, "is_compiled", lambda edits, rows: False)
    elif request.param != "compiled":
        from steer_kernels.apply_edits import triton_kernel

        monkeypatch.setattr(triton_kernel, "GROUPED_FROM", 1 if request.param == "blocks" else 1 << 30)
        # The least that matrix units take, so that few tokens fill blocks.
        monkeypatch.setattr(triton_kernel, "BLOCK", 16)
    return request.param
