"""Seam: the workers. Each proves its sites before it serves, and has methods for `collective_rpc`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vllm.logger import init_logger

from sae_models import HookPoint
from steer_server.engine.kernel_test import run_kernel_test
from steer_server.engine.self_test import SiteCheck
from steer_server.engine.vllm_compat.patching import when_imported, wrap
from steer_server.engine.vllm_compat.self_test_forwards import check_sites

# Under "vllm", whose handlers print in the engine's processes.
logger = init_logger(f"vllm.{__name__}")


def install() -> None:
    when_imported("vllm.v1.worker.gpu_worker", _install_gpu_worker)
    when_imported("vllm.v1.worker.cpu_worker", _install_cpu_worker)
    when_imported("vllm.v1.worker.worker_base", _install_worker_base)


def _install_gpu_worker(module: ModuleType) -> None:
    wrap(module.Worker, "compile_or_warm_up_model", (), _compile_or_warm_up_model)


def _install_cpu_worker(module: ModuleType) -> None:
    wrap(module.CPUWorker, "compile_or_warm_up_model", (), _compile_or_warm_up_model)


def _install_worker_base(module: ModuleType) -> None:
    module.WorkerBase.steering_self_test = _self_test_result
    module.WorkerBase.steering_capture = _capture
    module.WorkerBase.steering_take_captured = _take_captured


def _compile_or_warm_up_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    armed = self.model_runner.armed
    if armed is not None and armed.steering.table is not None:
        # Before: once vLLM has warmed up, it takes a kernel that is compiled for one that a request waits for.
        bank = armed.steering.bank.rows
        run_kernel_test(bank.shape[1], bank.dtype, bank.device, armed.steering.encoders.held)
    result = original(self, *args, **kwargs)
    if armed is not None:
        self.steering_checks = check_sites(self.model_runner)
        layers = sum(HookPoint.parse(check.site).kind == "resid_post" for check in self.steering_checks)
        others = len(self.steering_checks) - layers
        logger.info("Steering self-test passed at %d layers%s", layers, f" and {others} other sites" if others else "")
    return result


def _self_test_result(self: Any) -> list[dict[str, object]]:
    """Worker method for `collective_rpc("steering_self_test")`: the start-up checks, one for each armed site."""
    checks: list[SiteCheck] = getattr(self, "steering_checks", [])
    return [check.as_dict() for check in checks]


def _capture(self: Any, sites: list[str]) -> None:
    """Worker method for `collective_rpc("steering_capture")`: keep what leaves `sites` from now on."""
    self.model_runner.armed.steering.capture(sites)


def _take_captured(self: Any) -> list[bytes]:
    """Worker method for `collective_rpc("steering_take_captured")`: float32 [tokens, d_model] of each site."""
    return [stream.cpu().numpy().tobytes() for stream in self.model_runner.armed.steering.take_captured()]
