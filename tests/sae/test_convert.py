"""`steer-server sae convert`, run as typed; its second process reads the checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sae_models import HookPoint, SAEFormatError, Selection, load
from steer_server.cli import app
from tests.sae_models.build import build_sae
from tests.sae_models.conformance import FIXTURES, assert_close, assert_conforms, read


def pickled_cases():
    """Every fixture that is a pickle."""
    for path in sorted(FIXTURES.glob("*/*/expected.safetensors")):
        family = path.parent.parent.name
        case = read(path.parent)
        pickles = [case.checkpoint, *case.checkpoint.glob("*")]
        if case.metadata["expects"] == "load" and any(p.suffix in (".pt", ".pth") for p in pickles):
            yield pytest.param(case, id=f"{family}-{case.name}")


PICKLED = list(pickled_cases())
OPTIONS = {"mistral_sae": ["--hook", "blocks.16.hook_resid_post", "--k", "3"]}


def convert(*arguments):
    return CliRunner().invoke(app, ["sae", "convert", *map(str, arguments)])


def failed(result, message):
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), "a traceback"
    assert message in " ".join(result.stderr.split())


def fixture(name):
    return next(parameter.values[0] for parameter in PICKLED if parameter.id == name)


def test_there_are_pickles_of_each_family():
    found = {parameter.id.partition("-")[0] for parameter in PICKLED}
    assert found >= {"qwen_scope", "goodfire", "deepseek_r1", "openai_gpt2"}


# What the loaders make of every pickle is tested beside them; each process that reads one takes seconds.
ONE_OF_EACH_FAMILY = list({case.id.partition("-")[0]: case for case in reversed(PICKLED)}.values())


@pytest.mark.parametrize("expected", ONE_OF_EACH_FAMILY)
def test_a_converted_pickle_does_what_its_library_says(expected, tmp_path):
    result = convert(expected.checkpoint, tmp_path / "out", *OPTIONS.get(expected.metadata["family"], ()))
    assert result.exit_code == 0, result.output
    assert_conforms(load(tmp_path / "out"), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_it_says_what_it_wrote_and_how_to_serve_it(tmp_path):
    out = tmp_path / "some where" / "out"
    result = convert(fixture("qwen_scope-l0_3").checkpoint, out)
    assert "Qwen-Scope topk, 48 features of width 16 at blocks.7.hook_resid_post, written to" in result.stdout
    assert f"steer-server sae inspect '{out}'" in result.stdout
    name = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3/layer7"
    assert f"steer-server serve Qwen/Qwen3-1.7B-Base --sae '{name}={out}'" in result.stdout
    nowhere = convert(fixture("openai_gpt2-v5_resid_post_attn").checkpoint, tmp_path / "nowhere")
    assert "serve it:    not possible, the engine has no site there" in nowhere.stdout


def test_options_come_as_flags_or_behind_the_path(tmp_path):
    source = fixture("goodfire-r1_math").checkpoint
    for number, arguments in enumerate(
        (
            [source, tmp_path / "0", "--k", "2", "--hook", "model.layers.5", "--model", "org/m"],
            [f"{source}?k=2&hook=model.layers.5&model=org/m", tmp_path / "1"],
            [f"{source}?k=2&hook=model.layers.5", tmp_path / "2", "--model", "org/m"],
        )
    ):
        assert convert(*arguments).exit_code == 0
        sae = load(tmp_path / str(number))
        assert (sae.selection, sae.hook_points, sae.model_name) == (Selection(2), (HookPoint(5),), "org/m")
    failed(convert(f"{source}?k=2", tmp_path / "x", "--k", "3"), "'k' is given twice")
    failed(convert(source, tmp_path / "x", "--k", "0"), "k='0' must be a whole number of at least 1")
    failed(convert(source, tmp_path / "x", "--norm", "3"), "option norm=3.0 has no use for this checkpoint")
    failed(convert(f"{source}?layer=3", tmp_path / "x"), "SAE option 'layer' is not known")
    failed(convert(source, tmp_path / "x", "--dtype", "int8"), "supported: float32, bfloat16, float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_dtype(tmp_path):
    expected = fixture("deepseek_r1-llama_8b")
    assert convert(expected.checkpoint, tmp_path / "half", "--dtype", "bfloat16").exit_code == 0
    # It was saved in bfloat16, so nothing is lost.
    assert_conforms(load(tmp_path / "half"), expected)
    source = load(tmp_path / "half").weights.W_enc.source
    assert {source.dtype(name) for name in source.names()} == {torch.bfloat16}


def test_a_checkpoint_that_is_no_pickle(tmp_path):
    folder = build_sae(tmp_path / "in", "gated", tensors=gated(), cfg={"apply_b_dec_to_input": True})
    assert convert(folder, tmp_path / "out").exit_code == 0
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(3))
    before, after = load(folder), load(tmp_path / "out")
    assert_close(after.encode(x), before.encode(x))
    assert_close(after.decode(before.encode(x), x), before.decode(before.encode(x), x))


def gated():
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(24, generator=generator) * 0.3 for name in ("b_gate", "r_mag", "b_mag")}


class Runs:
    """Unpickled in full, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zipped, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    evil = tmp_path / "in" / "layer3.sae.pt"
    evil.parent.mkdir()
    state = torch.load(fixture("qwen_scope-l0_3").checkpoint, weights_only=True)
    torch.save(state | {"hook": Runs(tmp_path / "ran")}, evil, _use_new_zipfile_serialization=zipped)
    failed(convert(evil, tmp_path / "out", "--k", "3"), "holds more than tensors, numbers and strings (GLOBAL")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    # What is refused here is a program: opened without care it runs.
    torch.load(evil, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_what_is_no_checkpoint(tmp_path):
    junk = tmp_path / "layer3.sae.pt"
    published = fixture("qwen_scope-l0_3").checkpoint.read_bytes()
    for data, says in (
        (b"no pickle at all", "not a file that torch.save wrote, or damaged"),
        (published[: len(published) // 2], "not a file that torch.save wrote, or damaged"),
        (b"", "not a file that torch.save wrote, or damaged"),
    ):
        junk.write_bytes(data)
        result = convert(junk, tmp_path / "out", "--k", "3")
        failed(result, says)
        assert "weights_only" not in result.stderr
    torch.save([torch.zeros(3)], junk)
    failed(convert(junk, tmp_path / "out", "--k", "3"), "holds a list, not a dictionary of tensors")
    torch.save({"W_enc": [1, 2]}, junk)
    failed(convert(junk, tmp_path / "out", "--k", "3"), "W_enc is a list, not a tensor")
    torch.save({"W_enc": torch.zeros(3)}, tmp_path / "unknown.pt")
    failed(convert(tmp_path / "unknown.pt", tmp_path / "out"), "not a checkpoint of a supported family")
    failed(convert(tmp_path / "absent.pt", tmp_path / "out"), "absent.pt: no such file or folder")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_and_nothing_is_left_behind(tmp_path):
    source = fixture("qwen_scope-l0_3").checkpoint
    out = tmp_path / "out"
    out.mkdir()
    failed(convert(source, out), f"{out} exists; name a folder that does not")
    assert list(out.iterdir()) == []
    file = tmp_path / "file"
    file.write_text("mine")
    failed(convert(source, file / "out"), "cannot be written")
    huge = tmp_path / "layer1.sae.pt"
    state = torch.load(source, weights_only=True)
    torch.save(state | {"W_enc": state["W_enc"] * 1e30}, huge)
    failed(convert(huge, tmp_path / "half", "--k", "3", "--dtype", "float16"), "as float16 it cannot be read again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "layer1.sae.pt", "out"]


def test_the_folder_one_stands_in_is_not_imported_from(tmp_path):
    """A folder of downloads may hold a torch.py."""
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    source = fixture("qwen_scope-l0_3").checkpoint
    command = [str(Path(sys.executable).with_name("steer-server")), "sae", "convert", str(source), "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "out").d_sae == 48


def test_the_servers_refusal_names_a_command_that_works(tmp_path):
    source = fixture("goodfire-llama_8b").checkpoint
    with pytest.raises(SAEFormatError) as refusal:
        load(source)
    named = re.search(r"steer-server (sae convert '(.+)' OUT)", str(refusal.value))
    assert named[2] == str(source)
    assert convert(named[2], tmp_path / "out").exit_code == 0
    assert_conforms(load(tmp_path / "out"), fixture("goodfire-llama_8b"))
