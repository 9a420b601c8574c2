"""The check of the Triton kernel: it passes where the kernel is right and stops the server where it is not."""

import pytest
import torch

from steer_server.engine.kernel_test import run_kernel_test
from steer_server.engine.self_test import SelfTestError
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="test_interpreter.py runs this where Triton interprets"
)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_passes(dtype):
    run_kernel_test(48, dtype, DEVICE)


@pytest.mark.parametrize("wrong", ["does nothing", "leaves out the last token", "is a little off"])
def test_it_fails_where_the_kernel_is_wrong(wrong, monkeypatch):
    from steer_kernels.apply_edits import triton_kernel

    right = triton_kernel.apply_table

    def apply_table(hidden, residual, table, site):
        if wrong == "leaves out the last token":
            table.token_group[len(hidden) - 1] = -1
        if wrong != "does nothing":
            right(hidden, residual, table, site)
        if wrong == "is a little off":
            hidden.mul_(1.0001)

    monkeypatch.setattr(triton_kernel, "apply_table", apply_table)
    with pytest.raises(SelfTestError, match="the Triton kernel apply_edits is wrong"):
        run_kernel_test(48, torch.float32, DEVICE)
