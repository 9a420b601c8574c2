"""Seam: an engine without a server, from the arguments of `vllm serve`."""

from __future__ import annotations

from typing import Any

from steer_server.engine.vllm_compat.serving_app import serve_arguments


def self_test_checks(arguments: list[str]) -> list[dict[str, Any]]:
    """Start the engine that `vllm serve *arguments` would run, and return its workers' self-test, layer by layer.

    A failed self-test is raised by the engine's start-up.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    # Those of the HTTP server among them, so that a flag that nobody knows is an error here too.
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(serve_arguments(arguments)))
    workers: list[list[dict[str, Any]]] = engine.collective_rpc("steering_self_test")
    return [check for worker in workers for check in worker]
