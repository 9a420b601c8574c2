"""Seam: the V1 model runner. Requests enter and leave, and each forward finds its sites armed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from steer_server.engine.vllm_compat.armed_model import ArmedModel, arm
from steer_server.engine.vllm_compat.cuda_graphs import choose_graphs_for
from steer_server.engine.vllm_compat.patching import when_imported, wrap
from steer_server.engine.vllm_compat.step_reports import attach_report


def install() -> None:
    when_imported("vllm.v1.worker.gpu_model_runner", _install_runner)
    when_imported("vllm.v1.worker.cpu_model_runner", _install_cpu_runner)


def _install_runner(module: ModuleType) -> None:
    runner = module.GPUModelRunner
    wrap(runner, "load_model", (), _load_model)
    wrap(runner, "_update_states", ("scheduler_output",), _update_states)
    wrap(runner, "_model_forward", ("input_ids", "positions"), _model_forward)
    wrap(runner, "_dummy_run", ("num_tokens",), _dummy_run)
    wrap(runner, "sample_tokens", (), _sample_tokens)


def _install_cpu_runner(module: ModuleType) -> None:
    wrap(module.CPUModelRunner, "load_model", (), _load_model)


def _load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    self.armed = arm(self.vllm_config, self.get_model(), self.device)
    choose_graphs_for(self.armed, self.cudagraph_dispatcher)


def _update_states(original: Any, self: Any, scheduler_output: Any) -> Any:
    armed: ArmedModel | None = self.armed
    if armed is not None:
        for request_id in scheduler_output.finished_req_ids:
            armed.steering.remove_request(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            armed.add_request(new)
        armed.steering.expect_step(scheduler_output.num_scheduled_tokens)
    return original(self, scheduler_output)


def _model_forward(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    armed: ArmedModel | None = self.armed
    if armed is None or not armed.steering.has_work:
        return original(self, *args, **kwargs)
    batch = self.input_batch
    n = batch.num_reqs
    counts = np.diff(self.query_start_loc.np[: n + 1])
    armed.steering.begin_step(batch.req_ids, batch.num_computed_tokens_cpu[:n], counts)
    try:
        return original(self, *args, **kwargs)
    finally:
        armed.steering.end_step()


def _dummy_run(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    # It may be before the model is loaded.
    armed: ArmedModel | None = getattr(self, "armed", None)
    if armed is not None:
        armed.steering.expect_step(())
    return original(self, *args, **kwargs)


def _sample_tokens(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(self, *args, **kwargs)
    attach_report(self.armed, output)
    return output
