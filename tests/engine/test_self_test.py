"""The self-test on a small model: it passes where the op works and fails on every way that it can not work."""

import pytest
import torch

from steer_kernels.apply_edits import apply_edits
from steer_server.engine.self_test import Observation, SelfTestError, run_self_test

D_MODEL, LAYERS = 32, (0, 1, 2)


class Model:
    """Three residual layers with the op after each; `fault` breaks one thing."""

    def __init__(self, fault=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        self.weights = [(torch.randn(D_MODEL, D_MODEL, generator=generator) / 6).to(dtype) for _ in LAYERS]
        self.start = torch.randn(1, D_MODEL, generator=generator).to(dtype)
        self.fault = fault

    def __call__(self, tokens, compiled):
        residual = self.start.repeat(tokens, 1)
        hidden = torch.zeros_like(residual)
        before, after = [], []
        for site, weight in enumerate(self.weights):
            residual = residual + hidden
            hidden = torch.tanh(residual @ weight)
            if not compiled:
                before.append((hidden.float() + residual.float()).clone())
            broken = compiled if self.fault and self.fault.startswith("compiled") else not compiled
            faulty = self.fault is not None and broken and site == 1
            if not (faulty and "not called" in self.fault):
                target = hidden.clone() if faulty and "on a copy" in self.fault else hidden
                apply_edits(target, residual, 2 if faulty and "wrong site" in self.fault else site)
            if faulty and "twice" in self.fault:
                apply_edits(hidden, residual, site)
            if faulty and "half" in self.fault:
                hidden[2] *= 0.5
            if not compiled:
                after.append(hidden.float() + residual.float())
        return Observation(before if not compiled else [], after if not compiled else [], hidden + residual)


def run(model, compiled=True, dtype=torch.float32):
    return run_self_test(LAYERS, D_MODEL, dtype, torch.device("cpu"), model, compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [True, False])
def test_passes_on_a_model_that_steers(dtype, compiled):
    checks = run(Model(dtype=dtype), compiled, dtype)
    assert [c.layer for c in checks] == [0, 1, 2]
    assert all(c.passed for c in checks)
    assert all((c.compiled_error is None) == (not compiled) for c in checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["compiled", "eager"])
@pytest.mark.parametrize("fault", ["not called", "on a copy", "wrong site", "twice", "half"])
def test_fails_on_a_model_that_does_not(fault, where, dtype):
    with pytest.raises(SelfTestError, match="layer 1"):
        run(Model(f"{where}: {fault}", dtype), dtype=dtype)
