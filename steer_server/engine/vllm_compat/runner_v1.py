"""Seam: the V1 model runner. Requests enter and leave, and each forward finds its sites armed."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from sae_models import HookPoint
from steer_server.engine.self_test import Observation, SiteCheck, run_self_test
from steer_server.engine.vllm_compat.decoder_layers import Observe, Place, find_decoder_layers, find_places
from steer_server.engine.vllm_compat.engine_config import steering_config
from steer_server.engine.vllm_compat.engine_core import wire_plan
from steer_server.engine.vllm_compat.patching import when_imported, wrap
from steer_server.engine.vllm_compat.pipeline import sites_elsewhere, stage_input, stage_output
from steer_server.engine.worker import WorkerSteering
from steer_server.plan import decode_plan

# Under "vllm", whose handlers print in the engine's processes.
logger = init_logger(f"vllm.{__name__}")


def install() -> None:
    when_imported("vllm.v1.worker.gpu_model_runner", _install_runner)
    when_imported("vllm.v1.worker.cpu_model_runner", _install_cpu_runner)
    when_imported("vllm.v1.worker.gpu_worker", _install_gpu_worker)
    when_imported("vllm.v1.worker.cpu_worker", _install_cpu_worker)
    when_imported("vllm.v1.worker.worker_base", _install_worker_base)


def _install_runner(module: ModuleType) -> None:
    runner = module.GPUModelRunner
    wrap(runner, "load_model", (), _load_model)
    wrap(runner, "_update_states", ("scheduler_output",), _update_states)
    wrap(runner, "_model_forward", ("input_ids", "positions"), _model_forward)
    wrap(runner, "sample_tokens", (), _sample_tokens)


def _install_cpu_runner(module: ModuleType) -> None:
    wrap(module.CPUModelRunner, "load_model", (), _load_model)


def _install_gpu_worker(module: ModuleType) -> None:
    wrap(module.Worker, "compile_or_warm_up_model", (), _compile_or_warm_up_model)


def _install_cpu_worker(module: ModuleType) -> None:
    wrap(module.CPUWorker, "compile_or_warm_up_model", (), _compile_or_warm_up_model)


def _install_worker_base(module: ModuleType) -> None:
    module.WorkerBase.steering_self_test = _self_test_result
    module.WorkerBase.steering_capture = _capture
    module.WorkerBase.steering_take_captured = _take_captured


def _load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    config = steering_config(self.vllm_config)
    self.steering = None
    if config is None:
        return
    layers = find_decoder_layers(self.get_model(), config.n_layers)
    elsewhere = sites_elsewhere(config.sites, layers)
    config = replace(config, sites=tuple(site for site in config.sites if site not in elsewhere))
    points = [HookPoint.parse(site) for site in config.sites]
    self.steering_places = find_places(layers, points, config.d_model)
    for site, place in enumerate(self.steering_places):
        place.arm(site)
    # Here, so that it is part of what vLLM finds in use when it sizes the KV cache.
    self.steering = WorkerSteering(config, self.model_config.dtype, self.device, elsewhere)
    others = [str(point) for point in points if point.kind != "resid_post"]
    logger.info(
        "Steering: %d of %d decoder layers armed%s; %d SAE(s): %s; row bank of %d rows (%d edits a request), %.1f MiB",
        len(points) - len(others),
        config.n_layers,
        "" if not others else f", and {', '.join(others)}",
        len(config.saes),
        ", ".join(name for name, _ in config.saes) or "none",
        config.rows,
        config.max_edits,
        self.steering.nbytes / 2**20,
    )


def _update_states(original: Any, self: Any, scheduler_output: Any) -> Any:
    steering: WorkerSteering | None = self.steering
    if steering is not None:
        for request_id in scheduler_output.finished_req_ids:
            steering.remove_request(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            encoded = wire_plan(new.sampling_params)
            if encoded is not None:
                steering.add_request(new.req_id, decode_plan(encoded), new.prompt_len)
    return original(self, scheduler_output)


def _model_forward(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    steering: WorkerSteering | None = self.steering
    if steering is None or not steering.has_work:
        return original(self, *args, **kwargs)
    batch = self.input_batch
    n = batch.num_reqs
    counts = np.diff(self.query_start_loc.np[: n + 1])
    steering.begin_step(batch.req_ids, batch.num_computed_tokens_cpu[:n], counts)
    try:
        return original(self, *args, **kwargs)
    finally:
        steering.end_step()


def _sample_tokens(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(self, *args, **kwargs)
    report = None if self.steering is None else self.steering.take_report()
    if report is not None:
        # Asynchronous scheduling wraps the output that the scheduler will see.
        getattr(output, "_model_runner_output", output).steering_report = report
    return output


def _compile_or_warm_up_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    runner = self.model_runner
    steering: WorkerSteering | None = runner.steering
    if steering is not None:
        runner.steering_checks = _self_test(runner, steering)
        layers = sum(HookPoint.parse(check.site).kind == "resid_post" for check in runner.steering_checks)
        others = len(runner.steering_checks) - layers
        logger.info("Steering self-test passed at %d layers%s", layers, f" and {others} other sites" if others else "")
    return result


def _self_test_result(self: Any) -> list[dict[str, object]]:
    """Worker method for `collective_rpc("steering_self_test")`: the start-up checks, one for each armed site."""
    checks: list[SiteCheck] = getattr(self.model_runner, "steering_checks", [])
    return [check.as_dict() for check in checks]


def _capture(self: Any, sites: list[str]) -> None:
    """Worker method for `collective_rpc("steering_capture")`: keep what leaves `sites` from now on."""
    self.model_runner.steering.capture(sites)


def _take_captured(self: Any) -> list[bytes]:
    """Worker method for `collective_rpc("steering_take_captured")`: float32 [tokens, d_model] of each site."""
    return [stream.cpu().numpy().tobytes() for stream in self.model_runner.steering.take_captured()]


def _self_test(runner: Any, steering: WorkerSteering) -> list[SiteCheck]:
    from vllm.config import CompilationMode

    armed: list[Place] = runner.steering_places

    def run(tokens: int, compiled: bool, added: list[torch.Tensor] | None) -> Observation:
        before: list[torch.Tensor | None] = [None] * len(armed)
        after: list[torch.Tensor | None] = [None] * len(armed)
        in_two_parts = [False] * len(armed)

        def keep(into: list[torch.Tensor | None], site: int) -> Observe:
            def observe(hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
                into[site] = hidden.float().clone() if residual is None else hidden.float() + residual.float()

            return observe

        def before_op(site: int) -> Observe:
            def observe(hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
                in_two_parts[site] = residual is not None
                if residual is not None and added is not None:
                    residual += added[site]
                keep(before, site)(hidden, residual)

            return observe

        handles = []
        if not compiled:
            for site, place in enumerate(armed):
                handles += place.watch(before_op(site), keep(after, site))
        try:
            final = _run_tokens(runner, tokens, compiled)
        finally:
            for handle in handles:
                handle.remove()
        return Observation(before, after, in_two_parts, final)

    compiled = runner.compilation_config.mode != CompilationMode.NONE
    return run_self_test(steering.config.sites, runner.model_config.dtype, run, compiled)


@torch.inference_mode()
def _run_tokens(runner: Any, tokens: int, compiled: bool) -> torch.Tensor:
    """What the model, or this stage of it, returns for `tokens` copies of one token that do not see each other.

    [tokens, d_model].
    """
    from vllm.forward_context import set_forward_context

    positions = torch.zeros(tokens, dtype=torch.int64, device=runner.device)
    if runner.uses_mrope:
        positions = positions.expand(3, -1)
    if runner.lora_config is not None:
        # No adapter: else layers take the mapping of whatever ran last, if any did.
        runner._set_active_loras((0,) * tokens, (0,) * tokens, set())
    attention = [
        layer.impl
        for layer in runner.compilation_config.static_forward_context.values()
        if hasattr(getattr(layer, "impl", None), "forward")
    ]
    try:
        # Without metadata some attention backends leave their output as it was allocated.
        for impl in attention:
            impl.forward = _no_attention
        with set_forward_context(None, runner.vllm_config, num_tokens=tokens, skip_compiled=not compiled):
            output = runner.get_model()(
                input_ids=torch.ones(tokens, dtype=torch.int32, device=runner.device),
                positions=positions,
                intermediate_tensors=stage_input(runner.get_model(), tokens, runner.model_config.dtype, runner.device),
                inputs_embeds=None,
            )
    finally:
        for impl in attention:
            del impl.forward
    return stage_output(output)


def _no_attention(*args: Any, output: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    return None if output is None else output.zero_()
