"""Seam: finding a model's decoder layers and making each call the op on its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from steer_kernels.apply_edits import apply_edits


class ArmError(RuntimeError):
    """An architecture whose residual stream cannot be reached. The server must not start."""


def find_decoder_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The language model's list of `n_layers` decoder layers. Raises ArmError where there is not exactly one."""
    if hasattr(model, "get_language_model"):
        model = model.get_language_model()
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        raise ArmError(
            f"{type(model).__name__}: expected one list of {n_layers} decoder layers to steer, found {found}. "
            "This architecture is not supported; take steer_server out of VLLM_PLUGINS to serve it without steering."
        )
    (layers,) = lists.values()
    return layers


def arm(layers: nn.ModuleList, armed: Sequence[int], d_model: int) -> None:
    """Call the op on the output of each layer in `armed`, before vLLM compiles the model.

    Site numbers are places in `armed`. A forward hook is part of what torch.compile traces.
    """
    for site, index in enumerate(armed):
        layers[index].register_forward_hook(_edit_output(site, index, d_model))


def stream_parts(output: Any, index: int, d_model: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(hidden, residual) of a decoder layer's output; the residual stream is their sum, or hidden alone."""
    if isinstance(output, torch.Tensor):
        hidden, residual = output, None
    elif isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], torch.Tensor):
        hidden, residual = output
    else:
        raise ArmError(f"decoder layer {index} returns {type(output).__name__}, not a tensor or (hidden, residual)")
    for part in (hidden, residual):
        if part is not None and not (isinstance(part, torch.Tensor) and part.dim() == 2 and part.shape[-1] == d_model):
            shape = tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
            raise ArmError(f"decoder layer {index} returns {shape}, not [tokens, {d_model}]")
    return hidden, residual


def _edit_output(site: int, index: int, d_model: int) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden, residual = stream_parts(output, index, d_model)
        apply_edits(hidden, residual, site)

    return hook
