"""The self-test on a small model: it passes where the op works and fails on every way that it can not work."""

import re

import pytest
import torch

from sae_models import HookPoint
from steer_kernels.apply_edits import apply_edits
from steer_server.engine.self_test import Observation, SelfTestError, run_self_test

D_MODEL, LAYERS = 32, (0, 1, 2)
OUTPUTS = [str(HookPoint(layer)) for layer in LAYERS]
EVERYWHERE = [
    str(point)
    for layer in LAYERS
    for point in (
        *([HookPoint(0, "resid_pre")] if layer == 0 else []),
        *(HookPoint(layer, kind) for kind in ("attn_out", "mlp_in", "mlp_out", "resid_post")),
    )
]


class Model:
    """Three layers with an attention, which adds nothing, and an MLP of weight `mlp`; `fault` breaks one site."""

    def __init__(self, sites=OUTPUTS, fault=None, dtype=torch.float32, at=OUTPUTS[1], mlp=1.0):
        generator = torch.Generator().manual_seed(1)
        self.weights = [(torch.randn(D_MODEL, D_MODEL, generator=generator) / 6).to(dtype) for _ in LAYERS]
        self.start = torch.randn(1, D_MODEL, generator=generator).to(dtype)
        self.sites, self.fault, self.at, self.mlp, self.dtype = list(sites), fault, at, mlp, dtype

    def __call__(self, tokens, compiled, added):
        self.compiled, self.added = compiled, added
        self.in_two_parts = [False] * len(self.sites)
        self.before, self.after = ([None] * len(self.sites) for _ in range(2))
        residual = self.start.repeat(tokens, 1)
        self.op(HookPoint(0, "resid_pre"), residual)
        hidden = torch.zeros_like(residual)
        for layer, weight in enumerate(self.weights):
            residual = residual + hidden
            attention = torch.zeros_like(residual)
            self.op(HookPoint(layer, "attn_out"), attention)
            residual = residual + attention
            given = residual / residual.norm(dim=-1, keepdim=True)
            self.op(HookPoint(layer, "mlp_in"), given)
            hidden = self.mlp * torch.tanh(given @ weight)
            self.op(HookPoint(layer, "mlp_out"), hidden)
            self.op(HookPoint(layer), hidden, residual)
        stream = hidden + residual
        return Observation(self.before, self.after, self.in_two_parts, stream / stream.norm(dim=-1, keepdim=True))

    def op(self, point, hidden, residual=None):
        if str(point) not in self.sites:
            return
        site = self.sites.index(str(point))
        self.in_two_parts[site] = residual is not None
        if residual is not None and self.added is not None:
            residual += self.added[site]
        broken = self.compiled if self.fault and self.fault.startswith("compiled") else not self.compiled
        fault = self.fault if broken and str(point) == self.at and self.fault else ""

        def stream():
            return hidden.float().clone() if residual is None else hidden.float() + residual.float()

        if not self.compiled and "not passed" not in fault:
            self.before[site] = stream()
        if "not called" not in fault:
            target = hidden.clone() if "on a copy" in fault else hidden
            apply_edits(target, residual, len(self.sites) - 1 if "wrong site" in fault else site)
        if "twice" in fault:
            apply_edits(hidden, residual, site)
        if "half" in fault:
            hidden[1 + site] *= 0.5
        if not self.compiled and "not passed" not in fault:
            self.after[site] = stream()


def run(model, compiled=True):
    return run_self_test(model.sites, model.dtype, model, compiled)


@pytest.mark.parametrize("sites", [OUTPUTS, EVERYWHERE], ids=["outputs", "everywhere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [True, False])
def test_passes_on_a_model_that_steers(dtype, compiled, sites):
    checks = run(Model(sites, dtype=dtype), compiled)
    assert [c.site for c in checks] == sites
    assert [c.layer for c in checks] == [int(site.split(".")[1]) for site in sites]
    assert all(c.passed for c in checks)
    assert all((c.compiled_error is None) == (not compiled) for c in checks)


def test_a_site_of_little_weight_is_tried_with_a_larger_vector(monkeypatch):
    """What an edit of the MLP's input changes must be more than rounding for the compiled model to be compared."""

    class Rounding(Model):
        def __call__(self, tokens, compiled, added):
            seen = super().__call__(tokens, compiled, added)
            generator = torch.Generator().manual_seed(int(compiled))
            noise = torch.randn(seen.final.shape, generator=generator) * 5e-5 / D_MODEL**0.5
            return Observation(seen.before, seen.after, seen.in_two_parts, seen.final + noise)

    assert all(check.passed for check in run(Rounding(EVERYWHERE, mlp=0.001)))
    monkeypatch.setattr("steer_server.engine.self_test.MAX_GROWTHS", 0)
    with pytest.raises(SelfTestError, match=r"blocks\.1\.mlp\.hook_in: .* compiled model off by"):
        run(Rounding(EVERYWHERE, mlp=0.001))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["compiled", "eager"])
@pytest.mark.parametrize("fault", ["not called", "on a copy", "wrong site", "twice", "half"])
def test_fails_on_a_model_that_does_not(fault, where, dtype):
    with pytest.raises(SelfTestError, match="layer 1: off by"):
        run(Model(fault=f"{where}: {fault}", dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["compiled", "eager"])
@pytest.mark.parametrize("fault", ["not called", "on a copy", "wrong site"])
@pytest.mark.parametrize("at", [site for site in EVERYWHERE if "blocks.1" in site or "pre" in site])
def test_fails_where_any_kind_of_site_does_not(at, fault, where, dtype):
    with pytest.raises(SelfTestError, match=re.escape("layer 1: off by" if at == OUTPUTS[1] else f"{at}: off by")):
        run(Model(EVERYWHERE, f"{where}: {fault}", dtype, at))


def test_a_site_that_the_model_does_not_come_by_is_named():
    with pytest.raises(SelfTestError, match=r"does not come by blocks\.1\.hook_attn_out"):
        run(Model(EVERYWHERE, "eager: not passed", at="blocks.1.hook_attn_out"))


@pytest.mark.parametrize("where", ["compiled", "eager"])
def test_an_input_that_is_not_read_fails_its_output(where):
    """A transcoder that reads something else than what the MLP is given is wrong, though both its sites work."""

    class Elsewhere(Model):
        def op(self, point, hidden, residual=None):
            if point == HookPoint(1, "mlp_in") and self.compiled == (where == "compiled"):
                # The op sees another tensor, but what it adds is added to the right one.
                other = torch.zeros_like(hidden)
                super().op(point, other)
                hidden += other
                if not self.compiled:
                    self.before[self.sites.index(str(point))] = hidden.float() - other.float()
                    self.after[self.sites.index(str(point))] = hidden.float().clone()
            else:
                super().op(point, hidden, residual)

    with pytest.raises(SelfTestError, match=r"blocks\.1\.hook_mlp_out: off by"):
        run(Elsewhere(EVERYWHERE))


def test_a_residual_that_is_not_part_of_the_stream_is_refused():
    """Some layers return their output, complete, and beside it what came in: the sum of both is not the stream."""

    class Complete(Model):
        def op(self, point, hidden, residual=None):
            came_in = residual.clone() if point == HookPoint(1) else residual
            super().op(point, hidden, came_in)

    with pytest.raises(SelfTestError, match=r"the stream at blocks\.1\.hook_resid_post is not the sum"):
        run(Complete(EVERYWHERE))
