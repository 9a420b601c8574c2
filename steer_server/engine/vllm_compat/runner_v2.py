"""Seam: the V2 model runner, through the state that it keeps for its model. Each forward finds its sites armed."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from steer_server.engine.vllm_compat.armed_model import ArmedModel, arm
from steer_server.engine.vllm_compat.cuda_graphs import choose_graphs_for
from steer_server.engine.vllm_compat.engine_config import steering_config
from steer_server.engine.vllm_compat.patching import when_imported, wrap
from steer_server.engine.vllm_compat.pipeline import hand_on_missing, take_missing
from steer_server.engine.vllm_compat.step_reports import attach_report


def install() -> None:
    when_imported("vllm.v1.worker.gpu.model_states", _install_model_states)
    when_imported("vllm.v1.worker.gpu.model_runner", _install_runner)


def _install_model_states(module: ModuleType) -> None:
    wrap(module, "resolve_model_state_cls", ("vllm_config", "model"), _resolve_model_state_cls)


def _install_runner(module: ModuleType) -> None:
    runner = module.GPUModelRunner
    # The state of a model that nothing steers is vLLM's own.
    runner.armed = property(lambda self: getattr(self.model_state, "armed", None))
    wrap(runner, "execute_model", ("scheduler_output", "intermediate_tensors"), _execute_model)
    wrap(runner, "sample_tokens", (), _sample_tokens)


def _resolve_model_state_cls(original: Any, vllm_config: Any, model: torch.nn.Module) -> Any:
    chosen = original(vllm_config, model)
    return chosen if steering_config(vllm_config) is None else steered(chosen)


@functools.cache
def steered(chosen: Any) -> Any:
    """The ModelState class that vLLM chose for a model, told of its requests and steps."""

    from vllm.utils.gpu_sync_debug import gpu_sync_allowed

    class SteeredModelState(chosen):
        """What the runner tells it is what it tells every ModelState. A preempted request is removed, and added again
        with the tokens that it had generated, by which its prompt does not grow."""

        def __init__(self, vllm_config: Any, model: torch.nn.Module, encoder_cache: Any, device: torch.device) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            armed = arm(vllm_config, model, device)
            assert armed is not None
            self.armed: ArmedModel = armed
            self._in_forward = False
            self._positions_on_device = (
                vllm_config.speculative_config is not None and vllm_config.scheduler_config.async_scheduling
            )

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.armed.add_request(new_req_data)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.armed.steering.remove_request(req_id)

        def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
            """Arm the sites. Called before the forward of a batch of requests, and never for what vLLM makes up to
            profile, to warm up, to capture CUDA graphs or to keep data-parallel ranks in step."""
            super().preprocess_state(input_batch, *args, **kwargs)
            steering = self.armed.steering
            if not steering.has_work:
                return
            starts, counts = input_batch.num_computed_tokens_np, input_batch.num_scheduled_tokens
            if self._positions_on_device and steering.steers_any(input_batch.req_ids):
                # The scheduler took all drafts of the step before for accepted. How many were, the device finds out: a
                # step that is steered waits for it.
                with gpu_sync_allowed():
                    starts = input_batch.seq_lens[: input_batch.num_reqs].cpu().numpy() - counts
            steering.begin_step(input_batch.req_ids, starts, counts)
            self._in_forward = True

        def end_forward(self) -> None:
            """Disarm the sites, if this forward had them armed."""
            if self._in_forward:
                self._in_forward = False
                self.armed.steering.end_step()

    return SteeredModelState


def _execute_model(
    original: Any, self: Any, scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, **kwargs: Any
) -> Any:
    # A drafting model reads its prompt in the batch of the steered one, whose layout both must have.
    for chooser in (self.cudagraph_manager, getattr(self.speculator, "prefill_cudagraph_manager", None)):
        if chooser is not None:
            choose_graphs_for(self.armed, chooser)
    if self.armed is None:
        return original(self, scheduler_output, intermediate_tensors, *args, **kwargs)
    # Of a dummy batch too, whose requests nobody steers.
    self.armed.steering.expect_step(scheduler_output.num_scheduled_tokens)
    try:
        output = original(self, scheduler_output, intermediate_tensors, *args, **kwargs)
        # Behind the forward, which had to wait for them.
        take_missing(self.armed.steering, intermediate_tensors)
    finally:
        self.model_state.end_forward()
    return hand_on_missing(self.armed.steering, output, self.parallel_config.tensor_parallel_size)


def _sample_tokens(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(self, *args, **kwargs)
    attach_report(self.armed, output)
    return output
