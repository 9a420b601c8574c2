"""Seam: the application of `vllm serve`, with its engine, in a process of ours and without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Serving:
    """app: ASGI. model: the name or folder that the engine loaded. api_key: what requests must bring, if anything."""

    app: Any
    model: str
    max_num_seqs: int
    api_key: str | None


def api_key(args: Any) -> str | None:
    """A key that the application accepts, None where it wants none. args: those of `vllm serve`."""
    from vllm import envs

    return next((key for key in (args.api_key or [envs.VLLM_API_KEY]) if key), None)


def serve_arguments(arguments: list[str]) -> Any:
    """The arguments of `vllm serve`, parsed as it parses them; `model` is set. Exits where one is wrong."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    args.model = args.model_tag
    return args


@asynccontextmanager
async def serving_app(arguments: list[str]) -> AsyncIterator[Serving]:
    """Start the engine that `vllm serve *arguments` would start, and build the application it would serve."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    args = serve_arguments(arguments)
    args.serves_batches = False
    validate_parsed_serve_args(args)
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        # What vLLM tells to exit when the engine has died; here whoever asks looks at the engine itself.
        app.state.server = SimpleNamespace(should_exit=False)
        await init_app_state(engine, app.state, args, tasks)
        yield Serving(
            app,
            engine.model_config.model,
            engine.vllm_config.scheduler_config.max_num_seqs,
            api_key(args),
        )
