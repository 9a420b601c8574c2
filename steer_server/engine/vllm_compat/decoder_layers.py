"""Seam: finding a model's decoder layers, and hook points among their modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sae_models import HookPoint
from steer_kernels.apply_edits import apply_edits

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")
PRE_MLP_NORMS = ("pre_feedforward_layernorm", "pre_mlp_layernorm")
"""Beside one of these, `post_attention_layernorm` is what its name says; else it usually is the norm before the MLP."""
POST_MLP_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")


COMPLETE_OUTPUT = frozenset(
    {
        "Cohere2MoeDecoderLayer",
        "CohereCompassDecoderLayer",
        "CohereDecoderLayer",
        "Exaone4DecoderLayer",
        "GraniteMoeHybridAttentionDecoderLayer",
        "GraniteMoeHybridMambaDecoderLayer",
        "HyperCLOVAXDecoderLayer",
        "PhiMoEDecoderLayer",
        "StablelmDecoderLayer",
    }
)
"""Decoder layers that return two tensors of which the first is the stream: the second, what came in, is already in it.

The self-test refuses those that are not named here.
"""


class ArmError(RuntimeError):
    """An architecture in which a hook point cannot be reached. The server must not start."""


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


Observe = Callable[[torch.Tensor, torch.Tensor | None], None]
"""(hidden, residual): the stream at a place, as its sum, or hidden alone."""


@dataclass(frozen=True)
class Place:
    """Where a hook point is: the output of a module or, with `parameter`, the argument of that name and position."""

    point: HookPoint
    module: nn.Module
    d_model: int
    parameter: tuple[str, int] | None = None

    def arm(self, site: int) -> None:
        """Call the op here, before vLLM compiles the model. A forward hook is part of what torch.compile traces."""

        def edit_output(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden, residual = self._output(output)
            apply_edits(hidden, residual, site)

        def edit_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # On a copy: where an architecture has no norm before it, the input is also what is added to the output.
            edited = self._input(args, kwargs).clone()
            apply_edits(tokens_of(edited, self.d_model), None, site)
            return self._replaced(args, kwargs, edited)

        if self.parameter is None:
            self.module.register_forward_hook(edit_output)
        else:
            self.module.register_forward_pre_hook(edit_input, with_kwargs=True)

    def watch(self, before: Observe, after: Observe) -> list[RemovableHandle]:
        """Observe the stream on both sides of the op, in eager mode. Hooks run in order."""

        def on_output(observe: Observe) -> Any:
            return lambda module, inputs, output: observe(*self._output(output))

        def on_input(observe: Observe) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                stream = tokens_of(self._input(args, kwargs), self.d_model)
                assert stream is not None
                observe(stream, None)

            return hook

        if self.parameter is None:
            return [
                self.module.register_forward_hook(on_output(before), prepend=True),
                self.module.register_forward_hook(on_output(after)),
            ]
        return [
            self.module.register_forward_pre_hook(on_input(before), prepend=True, with_kwargs=True),
            self.module.register_forward_pre_hook(on_input(after), with_kwargs=True),
        ]

    def _output(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.point.kind == "resid_post":
            hidden, residual = stream_parts(output, self.point.layer, self.d_model)
            return hidden, None if type(self.module).__name__ in COMPLETE_OUTPUT else residual
        # Some attention modules have a place for weights or a bias beside their output.
        alone = isinstance(output, tuple) and len(output) > 0 and all(part is None for part in output[1:])
        stream = tokens_of(output[0] if alone else output, self.d_model)
        if stream is None:
            raise ArmError(
                f"{self.point}: {type(self.module).__name__} returns {shape_of(output)}, not [tokens, {self.d_model}]"
            )
        return stream, None

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        assert self.parameter is not None
        name, position = self.parameter
        given = args[position] if position < len(args) else kwargs.get(name)
        if tokens_of(given, self.d_model) is None:
            raise ArmError(
                f"{self.point}: {type(self.module).__name__} is given {shape_of(given)}, not [tokens, {self.d_model}]"
            )
        return given

    def _replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any], edited: torch.Tensor) -> Any:
        assert self.parameter is not None
        name, position = self.parameter
        if position < len(args):
            return (*args[:position], edited, *args[position + 1 :]), kwargs
        return args, kwargs | {name: edited}


def find_places(layers: nn.ModuleList, points: Sequence[HookPoint], d_model: int) -> list[Place]:
    """Where each of `points` is. Raises ArmError naming what was looked for and not found."""
    return [_place(layers[point.layer], point, d_model) for point in points]


def _place(layer: nn.Module, point: HookPoint, d_model: int) -> Place:
    if point.kind == "resid_post":
        return Place(point, layer, d_model)
    if point.kind == "resid_pre" and point.layer == 0:
        return Place(point, layer, d_model, _parameter(layer, point, "hidden_states"))
    if point.kind == "attn_out":
        attention, norm = _reduced(_child(layer, point, ATTENTION), point), _norm_after_attention(layer)
        return Place(point, attention if norm is None else norm, d_model)
    if point.kind == "mlp_out":
        mlp, norm = _reduced(_child(layer, point, MLP), point), _first(layer, POST_MLP_NORMS)
        return Place(point, mlp if norm is None else norm, d_model)
    if point.kind == "mlp_in":
        mlp = _child(layer, point, MLP)
        return Place(point, mlp, d_model, _parameter(mlp, point))
    raise ArmError(f"{point} cannot be armed")


def _first(layer: nn.Module, names: Sequence[str]) -> nn.Module | None:
    return next((child for name in names if isinstance(child := getattr(layer, name, None), nn.Module)), None)


def _child(layer: nn.Module, point: HookPoint, names: Sequence[str]) -> nn.Module:
    child = _first(layer, names)
    if child is None:
        present = ", ".join(name for name, _ in layer.named_children()) or "none"
        raise ArmError(
            f"{point}: {type(layer).__name__} has no module named {', '.join(names)}; its modules: {present}"
        )
    return child


def _norm_after_attention(layer: nn.Module) -> nn.Module | None:
    """The norm between the attention and the residual stream, in architectures that have one."""
    named = _first(layer, ("post_self_attn_layernorm",))
    if named is None and _first(layer, (*PRE_MLP_NORMS, "post_feedforward_layernorm")) is not None:
        return _first(layer, ("post_attention_layernorm",))
    return named


def _parameter(module: nn.Module, point: HookPoint, name: str | None = None) -> tuple[str, int]:
    """(name, position) of a parameter of the module's forward; the first one where no name is given."""
    parameters = list(inspect.signature(module.forward).parameters)
    wanted = parameters[0] if name is None and parameters else name
    if wanted not in parameters:
        raise ArmError(
            f"{point}: the forward of {type(module).__name__} takes no {wanted or 'argument'}; "
            f"it takes: {', '.join(parameters) or 'none'}"
        )
    return wanted, parameters.index(wanted)


def _reduced(module: nn.Module, point: HookPoint) -> nn.Module:
    """The module itself, whose output must be the whole sum under tensor parallelism, not this rank's part of it."""
    for name, child in module.named_children():
        linear = getattr(child, "base_layer", child)
        if getattr(linear, "tp_size", 1) > 1 and getattr(linear, "reduce_results", True) is False:
            raise ArmError(
                f"{point}: {type(module).__name__}.{name} leaves the sum over tensor-parallel ranks to the layer, so "
                "its output cannot be steered; serve with --tensor-parallel-size 1"
            )
    return module


def tokens_of(stream: Any, d_model: int) -> torch.Tensor | None:
    """A stream as [tokens, d_model], of which vLLM's Transformers backend makes a batch of one; None for all else."""
    if not isinstance(stream, torch.Tensor) or stream.shape[-1] != d_model:
        return None
    if stream.dim() == 3 and stream.shape[0] == 1:
        return stream[0]
    return stream if stream.dim() == 2 else None


def shape_of(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def stream_parts(output: Any, index: int, d_model: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(hidden, residual) of a decoder layer's output; the residual stream is their sum, or hidden alone."""
    if isinstance(output, torch.Tensor):
        parts: tuple[Any, Any] = (output, None)
    elif isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], torch.Tensor):
        parts = output
    else:
        raise ArmError(f"decoder layer {index} returns {type(output).__name__}, not a tensor or (hidden, residual)")
    hidden, residual = (None if part is None else tokens_of(part, d_model) for part in parts)
    for part, stream in zip(parts, (hidden, residual), strict=True):
        if part is not None and stream is None:
            raise ArmError(f"decoder layer {index} returns {shape_of(part)}, not [tokens, {d_model}]")
    assert hidden is not None
    return hidden, residual
