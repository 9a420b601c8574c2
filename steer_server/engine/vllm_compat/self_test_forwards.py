"""Seam: the forwards of the self-test, through the model of either runner and without a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from steer_server.engine.self_test import Observation, SiteCheck, run_self_test
from steer_server.engine.vllm_compat.decoder_layers import Observe
from steer_server.engine.vllm_compat.pipeline import stage_input, stage_output


def check_sites(runner: Any) -> list[SiteCheck]:
    """Prove that every site of a runner's armed model edits the stream, with the weights and kernels that will serve.

    Raises SelfTestError.
    """
    from vllm.config import CompilationMode

    places = runner.armed.places

    def run(tokens: int, compiled: bool, added: list[torch.Tensor] | None) -> Observation:
        before: list[torch.Tensor | None] = [None] * len(places)
        after: list[torch.Tensor | None] = [None] * len(places)
        in_two_parts = [False] * len(places)

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
            for site, place in enumerate(places):
                handles += place.watch(before_op(site), keep(after, site))
        try:
            final = _run_tokens(runner, tokens, compiled)
        finally:
            for handle in handles:
                handle.remove()
        return Observation(before, after, in_two_parts, final)

    compiled = runner.compilation_config.mode != CompilationMode.NONE
    return run_self_test(runner.armed.steering.config.sites, runner.model_config.dtype, run, compiled)


@torch.inference_mode()
def _run_tokens(runner: Any, tokens: int, compiled: bool) -> torch.Tensor:
    """What the model, or this stage of it, returns for `tokens` copies of one token that do not see each other.

    [tokens, d_model].
    """
    from vllm.forward_context import set_forward_context

    model, config = runner.get_model(), runner.model_config
    stage = stage_input(model, tokens, config.dtype, runner.device)
    input_ids: torch.Tensor | None = torch.ones(tokens, dtype=torch.int32, device=runner.device)
    inputs_embeds = None
    if stage is None and (config.supports_multimodal_inputs or config.enable_prompt_embeds):
        # As vLLM calls such models, and compiled them: with embeddings, and with ids only for those that want both.
        inputs_embeds = model.embed_input_ids(input_ids)
        input_ids = input_ids if getattr(model, "requires_raw_input_tokens", False) else None
    positions = torch.zeros(tokens, dtype=torch.int64, device=runner.device)
    if config.uses_mrope:
        positions = positions.expand(3, -1)
    if runner.lora_config is not None:
        # No adapter: else layers take the mapping of whatever ran last, if any did.
        runner._set_active_loras((0,) * tokens, (0,) * tokens, set())
    replaced: list[tuple[Any, str]] = []
    try:
        # Without metadata what mixes tokens may leave its output as it was allocated.
        for layer in runner.compilation_config.static_forward_context.values():
            replaced += _mix_nothing(layer)
        with set_forward_context(None, runner.vllm_config, num_tokens=tokens, skip_compiled=not compiled):
            output = model(
                input_ids=input_ids, positions=positions, intermediate_tensors=stage, inputs_embeds=inputs_embeds
            )
    finally:
        for holder, method in replaced:
            delattr(holder, method)
    return stage_output(output)


STATE_SPACE_METHODS = (
    "forward_impl",
    "conv_ssm_forward",
    "forward_cuda",
    "_forward",
    "_full_forward",
    "_forward_core",
    "_forward_core_rocm",
    "_forward_core_fused_norm_packed",
)
"""By which vLLM's custom ops of Mamba, short convolutions, linear attention and gated delta nets call their layers,
with one of OUTPUTS to write to. What is called by such a name without one, is left alone."""

OUTPUTS = ("output", "core_attn_out", "z_out")


def _mix_nothing(layer: Any) -> list[tuple[Any, str]]:
    """Make attention, or another layer that mixes tokens, return zero. What was replaced, as (object, attribute)."""
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    if isinstance(layer, MambaBase):
        replaced = [(layer, method) for method in STATE_SPACE_METHODS if hasattr(layer, method)]
        for _, method in replaced:
            setattr(layer, method, _with_zeroed_outputs(getattr(layer, method)))
        return replaced
    impl = getattr(layer, "impl", None)
    if impl is None or not hasattr(impl, "forward"):
        return []
    impl.forward = _no_attention
    return [(impl, "forward")]


def _with_zeroed_outputs(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    def mix_nothing(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        outputs = [given[name] for name in OUTPUTS if given.get(name) is not None]
        for output in outputs:
            output.zero_()
        return None if outputs else method(*args, **kwargs)

    return mix_nothing


def _no_attention(*args: Any, output: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    return None if output is None else output.zero_()
