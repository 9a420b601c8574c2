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


def install() -> None:
    when_imported("vllm.v1.worker.gpu.model_states", _install_model_states)
    when_imported("vllm.v1.worker.gpu.model_runner", _install_runner)


def _install_model_states(module: ModuleType) -> None:
    wrap(module, "resolve_model_state_cls", ("vllm_config", "model"), _resolve_model_state_cls)


def _install_runner(module: ModuleType) -> None:
    runner = module.GPUModelRunner
    # The state of a model that nothing steers is vLLM's own.
    runner.armed = property(lambda self: getattr(self.model_state, "armed", None))
    wrap(runner, "execute_model", ("scheduler_output", "dummy_run"), _execute_model)
    wrap(runner, "sample_tokens", (), _sample_tokens)


def _resolve_model_state_cls(original: Any, vllm_config: Any, model: torch.nn.Module) -> Any:
    chosen = original(vllm_config, model)
    return chosen if steering_config(vllm_config) is None else steered(chosen)


@functools.cache
def steered(chosen: Any) -> Any:
    """The ModelState class that vLLM chose for a model, told of its requests and steps."""

    class SteeredModelState(chosen):
        """What the runner tells it is what it tells every ModelState. A preempted request is removed, and added again
        with the tokens that it had generated, by which its prompt does not grow."""

        def __init__(self, vllm_config: Any, model: torch.nn.Module, encoder_cache: Any, device: torch.device) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            armed = arm(vllm_config, model, device)
            assert armed is not None
            self.armed: ArmedModel = armed
            self._in_forward = False

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
            # Of a request with drafts these are upper bounds of what the GPU knows; speculative decoding is refused.
            starts, counts = input_batch.num_computed_tokens_np, input_batch.num_scheduled_tokens
            steering.begin_step(input_batch.req_ids, starts, counts)
            self._in_forward = True

        def end_forward(self) -> None:
            """Disarm the sites, if this forward had them armed."""
            if self._in_forward:
                self._in_forward = False
                self.armed.steering.end_step()

    return SteeredModelState


def _execute_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.cudagraph_manager is not None:
        choose_graphs_for(self.armed, self.cudagraph_manager)
    try:
        return original(self, *args, **kwargs)
    finally:
        if self.armed is not None:
            self.model_state.end_forward()


def _sample_tokens(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(self, *args, **kwargs)
    report = None if self.armed is None else self.armed.steering.take_report()
    if report is not None:
        # What the scheduler will see is inside of it.
        output.model_runner_output.steering_report = report
    return output
