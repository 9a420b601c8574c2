"""Where things are in a decoder of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sae_models import HookPoint

ATTENTION = ("self_attn", "attn", "attention")
MLP = ("mlp", "feed_forward")


class LayoutError(ValueError):
    """An architecture in which something is not where it is looked for."""


def decoder_layers(network: nn.Module, n_layers: int) -> nn.ModuleList:
    """The one list of `n_layers` decoder layers."""
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(lists) != 1:
        raise LayoutError(
            f"{type(network).__name__}: found {len(lists)} lists of {n_layers} decoder layers, expected 1"
        )
    return lists[0]


def final_norm(network: nn.Module, layers: nn.ModuleList, d_model: int) -> nn.Module:
    """The one norm beside the decoder's layers."""
    decoder = next(module for module in network.modules() if layers in list(module.children()))
    norms = [
        module
        for module in decoder.children()
        if (weight := getattr(module, "weight", None)) is not None and weight.shape == (d_model,)
    ]
    if len(norms) != 1:
        raise LayoutError(f"{type(network).__name__}: found {len(norms)} norms beside the decoder's layers, expected 1")
    return norms[0]


def watch(layer: nn.Module, point: HookPoint, see: Callable[[torch.Tensor], None]) -> Any:
    """Call `see` with what passes `point` in every forward, [sequences, tokens, width]. Returns the hook's handle."""

    def output(module: nn.Module, inputs: Any, value: Any) -> None:
        see(value[0] if isinstance(value, tuple) else value)

    def input_(module: nn.Module, inputs: Any, named: Any) -> None:
        see(inputs[0] if inputs else named["hidden_states"])

    if point.kind == "resid_post":
        return layer.register_forward_hook(output)
    if point.kind == "resid_pre":
        return layer.register_forward_pre_hook(input_, with_kwargs=True)
    if point.kind == "mlp_in":
        return _child(layer, MLP, point).register_forward_pre_hook(input_, with_kwargs=True)
    # Layers that have a norm before the MLP and one named for after attention or MLP put it on what is added.
    norm = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}.get(point.kind)
    if norm is None:
        raise LayoutError(f"{point} is not a place that is read here")
    if hasattr(layer, "pre_feedforward_layernorm") and hasattr(layer, norm):
        return getattr(layer, norm).register_forward_hook(output)
    return _child(layer, ATTENTION if point.kind == "attn_out" else MLP, point).register_forward_hook(output)


def _child(layer: nn.Module, names: tuple[str, ...], point: HookPoint) -> nn.Module:
    found = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
    if found is None:
        raise LayoutError(f"{type(layer).__name__}: found none of {', '.join(names)}, so {point} cannot be read")
    return found
