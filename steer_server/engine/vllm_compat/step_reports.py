"""Seam: a worker's report of a step rides on the step's output, of either model runner, and is whole when that is."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from steer_server.engine.vllm_compat.armed_model import ArmedModel
from steer_server.engine.vllm_compat.patching import when_imported, wrap


def install() -> None:
    when_imported("vllm.v1.worker.gpu_model_runner", _install_v1)
    when_imported("vllm.v1.worker.gpu.async_utils", _install_v2)


def _install_v1(module: ModuleType) -> None:
    wrap(module.AsyncGPUModelRunnerOutput, "get_output", (), _get_output)


def _install_v2(module: ModuleType) -> None:
    wrap(module.AsyncOutput, "get_output", (), _get_output)


def attach_report(armed: ArmedModel | None, output: Any) -> None:
    """Put what the last forward did on its output, if it had a steered request."""
    report = None if armed is None else armed.steering.take_report()
    if report is None:
        return
    # What the scheduler will see, inside of what waits for the device: V1's name for it, and V2's.
    for inside in ("_model_runner_output", "model_runner_output"):
        if hasattr(output, inside):
            getattr(output, inside).steering_report = report
            return
    output.steering_report = report.settled()


def _get_output(original: Any, self: Any) -> Any:
    output = original(self)
    report = getattr(output, "steering_report", None)
    if report is not None:
        output.steering_report = report.settled()
    return output
