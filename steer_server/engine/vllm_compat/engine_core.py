"""Seam: the scheduler's process. Prefix-cache keys know a request's edits; the workers' reports ride on its outputs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from steer_server.engine.vllm_compat.patching import when_imported, wrap
from steer_server.plan import BlockKeys, decode_plan

TAG = "steering"
HASHING_MODULES = ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")
"""Each holds a name of its own for the function that collects a block's extra keys."""


def install() -> None:
    for module in HASHING_MODULES:
        when_imported(module, _install_hashing)
    when_imported("vllm.v1.core.sched.scheduler", _install_scheduler)


def _install_hashing(module: ModuleType) -> None:
    wrap(module, "generate_block_hash_extra_keys", ("request", "start_token_idx", "end_token_idx"), _extra_keys)


def _install_scheduler(module: ModuleType) -> None:
    wrap(module.Scheduler, "update_from_output", ("scheduler_output", "model_runner_output"), _update_from_output)


def wire_plan(sampling_params: Any) -> bytes | None:
    """The encoded plan that admission attached to a request, if any."""
    if sampling_params is None or not sampling_params.extra_args:
        return None
    steering = sampling_params.extra_args.get(TAG)
    return None if steering is None else steering["plan"]


def _block_keys(request: Any) -> BlockKeys | None:
    try:
        return request._steering_block_keys
    except AttributeError:
        encoded = wire_plan(request.sampling_params)
        keys = None if encoded is None else BlockKeys(decode_plan(encoded), request.num_prompt_tokens)
        request._steering_block_keys = keys
        return keys


def _extra_keys(
    original: Any, request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
) -> tuple[tuple[Any, ...] | None, int]:
    extra, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    keys = _block_keys(request)
    key = None if keys is None else keys.key(start_token_idx, end_token_idx)
    if key is not None:
        # vLLM's KV events take (tag, value) pairs.
        extra = (*(extra or ()), (TAG, key))
    return extra, next_mm_idx


def _update_from_output(original: Any, self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
    report = getattr(model_runner_output, "steering_report", None)
    if report is None:
        return original(self, scheduler_output, model_runner_output)
    # A chunk of a prompt has no output yet: its span waits on the request. Finished requests leave self.requests below.
    reported = {request_id: self.requests.get(request_id) for request_id in report.spans}
    for request_id, span in report.spans.items():
        request = reported[request_id]
        if request is not None:
            spans, missing, gates = request.__dict__.setdefault("_steering_reports", ([], [], []))
            spans.append(_without_rejected(span, request_id, scheduler_output, model_runner_output))
            missing.extend(report.missing_sites)
            if request_id in report.gates:
                gates.append(report.gates[request_id])
    outputs = original(self, scheduler_output, model_runner_output)
    for client_outputs in outputs.values():
        for output in client_outputs.outputs:
            request = reported.get(output.request_id)
            if request is not None and (waiting := request.__dict__.pop("_steering_reports", None)) is not None:
                # The only field of an output that takes a dict and that no one else sets on these requests.
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), TAG: waiting}
    return outputs


def _without_rejected(
    span: tuple[int, int], request_id: str, scheduler_output: Any, model_runner_output: Any
) -> tuple[int, int]:
    """The positions of `span` that stay: those of drafted tokens that the model rejected are computed again."""
    drafted = scheduler_output.scheduled_spec_decode_tokens.get(request_id)
    if not drafted:
        return span
    sampled = model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[request_id]]
    # Each accepted draft is sampled again, and one token after the last of them.
    rejected = len(drafted) + 1 - max(len(sampled), 1)
    return span[0], span[1] - rejected
