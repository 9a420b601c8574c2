"""Seam: vLLM's configuration carries ours to every process, and the compiled graph's cache key knows of our ops."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from steer_server.engine.config import SteeringConfig, parse_options, resolve_config
from steer_server.engine.vllm_compat.cuda_graphs import split_at_the_op
from steer_server.engine.vllm_compat.patching import when_imported, wrap
from steer_server.engine.vllm_compat.supported import is_steerable, model_facts, refuse_unsupported

KEY = "steering"


def steering_config(vllm_config: Any) -> SteeringConfig | None:
    """The resolved configuration of an engine, or None where it was not armed."""
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or "resolved" not in additional.get(KEY, {}):
        return None
    return SteeringConfig.from_dict(additional[KEY])


def install() -> None:
    when_imported("vllm.engine.arg_utils", _install_create)
    when_imported("vllm.config.vllm", _install_hash)


def _install_create(module: ModuleType) -> None:
    wrap(module.EngineArgs, "create_engine_config", (), _create_engine_config)


def _install_hash(module: ModuleType) -> None:
    wrap(module.VllmConfig, "compute_hash", (), _compute_hash)


def _create_engine_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    vllm_config = original(self, *args, **kwargs)
    if is_steerable(vllm_config):
        refuse_unsupported(vllm_config)
        additional = dict(vllm_config.additional_config)
        options = parse_options(additional.get(KEY, {}))
        additional[KEY] = resolve_config(options, model_facts(vllm_config)).as_dict()
        vllm_config.additional_config = additional
        split_at_the_op(vllm_config.compilation_config)
    return vllm_config


def _compute_hash(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    config = steering_config(self)
    if config is None:
        return original(self, *args, **kwargs)
    # Names and folders of SAEs do not change the graph: loading another one must not cost a compilation.
    full = self.additional_config
    try:
        self.additional_config = {k: v for k, v in full.items() if k != KEY} | config.graph_factors()
        return original(self, *args, **kwargs)
    finally:
        self.additional_config = full
