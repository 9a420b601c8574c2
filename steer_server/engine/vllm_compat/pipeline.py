"""Seam: pipeline stages. Each arms its own layers; what it did travels with the stream to the stage behind it, since
the scheduler hears only the last one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sae_models import HookPoint
from steer_server.engine.vllm_compat.patching import when_imported, wrap
from steer_server.engine.worker import WorkerSteering

KEY = "steering_missing_sites"
"""Among the tensors that one stage sends to the next."""
UNREPORTED = ["all sites of the pipeline stages before"]
SEED = 21


def install() -> None:
    when_imported("vllm.v1.worker.gpu_model_runner", _install_runner)


def _install_runner(module: ModuleType) -> None:
    runner = module.GPUModelRunner
    wrap(runner, "execute_model", ("scheduler_output", "intermediate_tensors"), _execute_model)
    wrap(runner, "sync_and_gather_intermediate_tensors", ("intermediate_tensors",), _sync_and_gather)


def sites_elsewhere(sites: Iterable[str], layers: nn.ModuleList) -> frozenset[str]:
    """Those of `sites` whose decoder layers other stages hold."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return frozenset(site for site in sites if isinstance(layers[HookPoint.parse(site).layer], PPMissingLayer))


def stage_input(model: Any, tokens: int, dtype: torch.dtype, device: torch.device) -> Any:
    """What a stage before could send for `tokens` equal tokens; None for the first stage.

    Random, of the size that a normalised stream has, and the same on all tensor-parallel ranks.
    """
    from vllm.distributed.parallel_state import get_pp_group

    if get_pp_group().is_first_rank:
        return None
    given = model.make_empty_intermediate_tensors(tokens, dtype, device)
    generator = torch.Generator().manual_seed(SEED)
    for tensor in given.tensors.values():
        tensor.copy_(torch.randn(tensor.shape[1:], generator=generator).expand_as(tensor))
    return given


def stage_output(output: Any) -> torch.Tensor:
    """The stream [tokens, d_model] that a stage hands on, or what the model returns.

    Between stages it is one tensor, or the sum of two, as between decoder layers.
    """
    from vllm.sequence import IntermediateTensors

    if isinstance(output, IntermediateTensors):
        return torch.stack(list(output.tensors.values())).sum(0)
    # Beside the stream some models return what a drafting model reads.
    stream: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return stream


def encode_missing(sites: list[str], indivisible_by: int) -> torch.Tensor:
    """Hook points as uint8 [n].

    vLLM sends each tensor-parallel rank a part of a tensor where its size allows, to gather them on the GPU behind.
    `indivisible_by`, the number of ranks, keeps these bytes together and on the CPU.
    """
    data = json.dumps(sites).encode()
    if indivisible_by > 1:
        data += b" " * ((1 - len(data)) % indivisible_by)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decode_missing(data: torch.Tensor) -> list[str]:
    sites: list[str] = json.loads(bytes(data.tolist()))
    return sites


def take_missing(steering: WorkerSteering, intermediate_tensors: Any) -> None:
    """Take out of what a stage received which sites the stages before it missed. Waits for it."""
    if intermediate_tensors is not None:
        received = intermediate_tensors.tensors.pop(KEY, None)
        steering.missing_before = UNREPORTED if received is None else decode_missing(received)


def hand_on_missing(steering: WorkerSteering, output: Any, tensor_parallel_size: int) -> Any:
    """The output of a forward; with what was missed up to here in it, where it goes to the stage behind."""
    from vllm.sequence import IntermediateTensors

    if not isinstance(output, IntermediateTensors):
        return output
    report = steering.take_report()
    if report is None:
        return output
    missing = encode_missing(report.missing_sites, tensor_parallel_size)
    return IntermediateTensors({**output.tensors, KEY: missing})


def _sync_and_gather(original: Any, self: Any, num_tokens: int, intermediate_tensors: Any, sync_self: bool) -> Any:
    # Here, because reading them waits for them, and this is where vLLM does.
    if self.armed is not None:
        take_missing(self.armed.steering, intermediate_tensors)
    return original(self, num_tokens, intermediate_tensors, sync_self)


def _execute_model(original: Any, self: Any, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
    output = original(self, scheduler_output, intermediate_tensors)
    if self.armed is None:
        return output
    return hand_on_missing(self.armed.steering, output, self.parallel_config.tensor_parallel_size)
