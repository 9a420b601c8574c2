"""The check of the Triton kernel: it passes where the kernel is right and stops the server where it is not."""

import pytest
import torch

from steer_kernels.apply_edits import TopKEncoder
from steer_kernels.apply_edits.step_table import GATE, WORDS
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_ranks_a_feature_of_each_encoder(dtype, monkeypatch):
    from steer_kernels.apply_edits import membership

    generator = torch.Generator().manual_seed(1)

    def encoder(**options):
        b_enc = torch.randn(96, generator=generator) * 0.1
        return TopKEncoder(torch.randn(48, 96, generator=generator), b_enc, 4, **options)

    router = torch.randn(48, 3, generator=generator), torch.zeros(3)
    encoders = [encoder(), encoder(absolute=True), encoder(groups=3), encoder(groups=3, router=router)]
    run_kernel_test(48, dtype, DEVICE, encoders)
    right = membership.count_above

    def count_above(*arguments):
        p, ahead = right(*arguments)
        return p, ahead + 4

    monkeypatch.setattr(membership, "count_above", count_above)
    with pytest.raises(SelfTestError, match="count_above, which it asks, is wrong"):
        run_kernel_test(48, dtype, DEVICE, encoders[:1])


@pytest.mark.parametrize("wrong", ["does nothing", "leaves out the last token", "is a little off", "has no gates"])
def test_it_fails_where_the_kernel_is_wrong(wrong, monkeypatch):
    from steer_kernels.apply_edits import triton_kernel

    right = triton_kernel.apply_table

    def apply_table(hidden, residual, table, site):
        if wrong == "leaves out the last token":
            table.token_group[len(hidden) - 1] = -1
        if wrong == "has no gates":
            table.records.view(-1, WORDS)[:, GATE] = 0
        if wrong != "does nothing":
            right(hidden, residual, table, site)
        if wrong == "is a little off":
            hidden.mul_(1.0001)

    monkeypatch.setattr(triton_kernel, "apply_table", apply_table)
    with pytest.raises(SelfTestError, match="the Triton kernel apply_edits is wrong"):
        run_kernel_test(48, torch.float32, DEVICE)
