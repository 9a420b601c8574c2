"""What the application of `vllm serve` is built with, in a process of ours."""

import inspect

import pytest

from steer_server.engine.vllm_compat.offline import self_test_checks
from steer_server.engine.vllm_compat.serving_app import api_key


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_application_is_built_as_we_know_it():
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.v1.engine.async_llm import AsyncLLM

    assert parameters(entry.build_async_engine_client)[0] == "args"
    assert parameters(build_app) == ["args", "supported_tasks", "model_config"]
    assert parameters(init_app_state) == ["engine_client", "state", "args", "supported_tasks"]
    # `vllm serve` does the same two steps.
    source = inspect.getsource(entry.build_and_serve)
    assert "app = build_app(args, supported_tasks, model_config)" in source
    assert "await init_app_state(engine_client, app.state, args, supported_tasks)" in source
    assert isinstance(AsyncLLM.errored, property)


def test_what_vllm_sets_and_reads_on_the_application():
    from vllm.entrypoints.launchers import launcher
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.serve.exception_handling.handlers import vllm_error

    assert "app.state.server = server" in inspect.getsource(launcher)
    assert "server=req.app.state.server" in inspect.getsource(vllm_error)
    assert "server.should_exit = True" in inspect.getsource(launcher.terminate_if_errored)
    assert "state.engine_client = engine_client" in inspect.getsource(init_app_state)
    assert "state.vllm_config = vllm_config" in inspect.getsource(init_app_state)


def test_the_arguments_of_serve(monkeypatch):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["some/model", "--max-num-seqs", "3"])
    validate_parsed_serve_args(args)
    assert (args.model_tag, args.max_num_seqs) == ("some/model", 3)
    assert args.tool_parser_plugin == args.reasoning_parser_plugin == ""
    assert api_key(args) is None
    args.api_key = ["secret", "other"]
    assert api_key(args) == "secret"
    monkeypatch.setenv("VLLM_API_KEY", "from the environment")
    args.api_key = None
    assert api_key(args) == "from the environment"


def test_a_flag_that_serve_does_not_know_is_none_of_the_doctors(capsys):
    """Refused before an engine is started; `--port` is a flag of the HTTP server, `--dtype` one of the engine."""
    with pytest.raises(SystemExit):
        self_test_checks(["some/model", "--port", "1", "--dtype", "half", "--no-such-flag"])
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


def test_a_given_up_answer_says_so():
    from vllm.v1.engine import FinishReason

    assert str(FinishReason.ABORT) == "abort"
