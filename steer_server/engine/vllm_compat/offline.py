"""Seam: an engine without a server, from the arguments of `vllm serve`."""

from __future__ import annotations

from typing import Any


def self_test_checks(arguments: list[str]) -> list[dict[str, Any]]:
    """Start the engine that `vllm serve *arguments` would run, and return its workers' self-test, layer by layer.

    A failed self-test is raised by the engine's start-up.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    model, *flags = arguments
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    # Flags of the HTTP server mean nothing here.
    known, _ = parser.parse_known_args(["--model", model, *flags])
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(known))
    workers: list[list[dict[str, Any]]] = engine.collective_rpc("steering_self_test")
    return [check for worker in workers for check in worker]
