"""Seam: the front end. Requests are admitted on their way in, receipts are attached on their way out."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from steer_server.engine.admission import Admission, AdmittedSteering, NotAppliedError, Sequence
from steer_server.engine.vllm_compat.engine_config import steering_config
from steer_server.engine.vllm_compat.engine_core import TAG
from steer_server.engine.vllm_compat.patching import when_imported, wrap
from steer_server.spec import SteeringError


def install() -> None:
    when_imported("vllm.v1.engine.input_processor", _install_input)
    when_imported("vllm.v1.engine.output_processor", _install_output)


def _install_input(module: ModuleType) -> None:
    wrap(module.InputProcessor, "__init__", ("vllm_config",), _init_input_processor)
    wrap(module.InputProcessor, "process_inputs", ("params", "resumable"), _process_inputs)


def _install_output(module: ModuleType) -> None:
    wrap(module.OutputProcessor, "add_request", ("request",), _add_request)
    wrap(module.OutputProcessor, "process_outputs", ("engine_core_outputs",), _process_outputs)
    wrap(module.RequestState, "make_request_output", ("finish_reason",), _make_request_output)


class WirePlan(dict[str, bytes]):
    """What travels to the engine in `extra_args["steering"]`; on this side it remembers whose it is."""

    def __init__(self, admitted: AdmittedSteering) -> None:
        super().__init__(plan=admitted.encoded_plan)
        self.admitted = admitted


def admission_of(input_processor: Any) -> Admission | None:
    """Where requests of this engine are admitted; None for one that is not armed."""
    return input_processor.steering_admission


def admit(input_processor: Any, value: object, choices: int, root: str) -> AdmittedSteering:
    """Admit what a client sent. Raises vLLM's form of SteeringError."""
    from steer_server.engine.vllm_compat.errors import SteeringRequestError

    admission = admission_of(input_processor)
    try:
        if admission is None:
            raise SteeringError("this engine was not armed for steering", root)
        return admission.admit(value, choices, root)
    except SteeringError as error:
        raise SteeringRequestError(error) from error


def _init_input_processor(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    original(self, vllm_config, *args, **kwargs)
    config = steering_config(vllm_config)
    self.steering_admission = None if config is None else Admission(config)


def _process_inputs(
    original: Any, self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    from steer_server.engine.vllm_compat.errors import SteeringRequestError

    extra_args = getattr(params, "extra_args", None)
    value = None if extra_args is None else extra_args.get(TAG)
    if value is None:
        return original(self, request_id, prompt, params, *args, **kwargs)
    admitted = value if isinstance(value, AdmittedSteering) else admit(self, value, params.n, TAG)
    if kwargs.get("resumable"):
        error = SteeringError("steering of streamed inputs is not supported by this version", TAG)
        raise SteeringRequestError(error)
    request = original(self, request_id, prompt, params, *args, **kwargs)
    # The processed copy, not the caller's parameters, which may serve many prompts.
    sampling_params = request.sampling_params
    sampling_params.extra_args = {**sampling_params.extra_args, TAG: WirePlan(admitted)}
    return request


def _add_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    params = request.sampling_params
    wire = None if params is None or params.extra_args is None else params.extra_args.get(TAG)
    if wire is not None and not isinstance(wire, WirePlan):
        from steer_server.engine.vllm_compat.errors import SteeringRequestError

        raise SteeringRequestError(
            SteeringError("the request did not pass InputProcessor.process_inputs, so it was not admitted", TAG)
        )
    original(self, request, *args, **kwargs)
    if wire is not None:
        state = self.request_states[request.request_id]
        state.steering = wire.admitted.start_sequence(state.prompt_len)
        state.steering_output_processor = self


def _process_outputs(original: Any, self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
    for output in engine_core_outputs:
        carried = output.kv_transfer_params
        if carried is not None and TAG in carried:
            spans, missing, gates = carried.pop(TAG)
            output.kv_transfer_params = carried or None
            state = self.request_states.get(output.request_id)
            if state is not None:
                state.steering.add_report(spans, missing, gates)
    processed = original(self, engine_core_outputs, *args, **kwargs)
    # Only now: a failed request that vLLM has not taken leave of would keep the next call waiting.
    failures = self.__dict__.pop("_steering_failures", None)
    if failures:
        raise failures[0]
    return processed


def _make_request_output(
    original: Any, self: Any, new_token_ids: Any, pooling_output: Any, finish_reason: Any, *args: Any, **kwargs: Any
) -> Any:
    sequence: Sequence | None = getattr(self, "steering", None)
    if sequence is None or finish_reason is None:
        return original(self, new_token_ids, pooling_output, finish_reason, *args, **kwargs)
    from vllm.v1.engine import FinishReason

    from steer_server.engine.vllm_compat.errors import SteeringNotAppliedError

    aborted = finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
    try:
        sequence.finish(self.detokenizer.num_output_tokens(), aborted)
    except NotAppliedError as error:
        failure = SteeringNotAppliedError(error)
        if self.queue is None:
            # Offline, where whoever asked calls `_process_outputs`.
            self.steering_output_processor.__dict__.setdefault("_steering_failures", []).append(failure)
        else:
            self.queue.put(failure)
        return None
    output = original(self, new_token_ids, pooling_output, finish_reason, *args, **kwargs)
    if output is not None and output.finished:
        output.steering = sequence.admitted.receipt().as_json()
    return output
