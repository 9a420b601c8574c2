"""`steer-server sae`, as typed."""

import json

import pytest
from typer.testing import CliRunner

from sae_models import load
from sae_models.features import Context, Evidence, Feature, TokenScore, create_store
from steer_server.cli import app
from steer_server.sae.texts import TextError, read_texts
from tests.sae_models.build import build_sae


def run(*arguments):
    return CliRunner().invoke(app, ["sae", *map(str, arguments)])


def failed(result, message):
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), "a traceback"
    assert message in " ".join(result.stderr.split())


@pytest.fixture
def folder(tmp_path):
    folder = build_sae(tmp_path / "sae", "jumprelu", seed=1)
    sae = load(folder)
    evidence = Evidence(sae.name, sae.sha256, "some/model", sae.hook_point.layer, sae.d_sae, 1000, 10.0, ("x",))
    scores = (TokenScore(" sea", 1.5), TokenScore("\n", 0.5))
    context = Context(("the", "\n", "wide", " sea"), (0.0, 0.0, 0.0, 4.0), 3, (1, 4))
    features = [
        Feature(0, 0.01, 4.0, 1.0, (1.0,) * 5, scores, (), scores, (context,), "the sea [blue]", "read"),
        Feature(1, 0.02, 4.0, 1.0, (1.0,) * 5, (), (), (), (), "tokens: ship", "automatic"),
    ]
    create_store(folder / "features.sqlite", evidence, features)
    return folder


def test_search(folder):
    shown = run("search", folder, "sea")
    assert shown.exit_code == 0
    assert "[blue]" in shown.stdout
    assert "2 to 5" in shown.stdout
    found = json.loads(run("search", folder, "sea", "--json").stdout)
    assert found == [
        {
            "index": 0, "label": "the sea [blue]", "label_source": "read", "max_activation": 4.0, "density": 0.01,
            "suggested": {"op": "set", "low": 2.0, "high": 5.0},
        }
    ]  # fmt: skip
    nothing = run("search", folder, '"')
    assert nothing.exit_code == 0
    assert "Nothing" in nothing.stderr


def test_show(folder):
    shown = run("show", folder, 0).stdout
    assert "the sea [blue]" in shown
    assert "4.0  the wide« sea»" in shown
    assert json.loads(run("show", folder, 0, "--json").stdout)["contexts"][0]["span"] == [1, 4]
    failed(run("show", folder, 7), "there is nothing about feature 7")


def test_label(folder, tmp_path):
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"index": 1, "label": "ships that sail"}\n')
    done = run("label", folder, labels)
    assert done.exit_code == 0
    assert "1 of 1 labels were new" in done.stderr
    assert [row["index"] for row in json.loads(run("search", folder, "sailing", "--json").stdout)] == [1]
    labels.write_text('{"index": 100000, "label": "x"}\n')
    failed(run("label", folder, labels), "labels.jsonl:1: index must be a feature of the SAE")
    failed(run("label", folder, tmp_path / "absent"), "cannot be read")


def test_import_makes_a_file_where_there_is_none(folder, tmp_path):
    export = tmp_path / "batch-0.jsonl"
    export.write_text('{"index": "3", "description": "weather and storms"}\n')
    (folder / "features.sqlite").unlink()
    failed(run("search", folder, "storm"), "make it with: steer-server sae explain")
    assert run("import-neuronpedia", folder, export).exit_code == 0
    (row,) = json.loads(run("search", folder, "storm", "--json").stdout)
    assert (row["index"], row["label_source"], row["suggested"]) == (3, "imported", None)
    assert "unknown" in run("show", folder, 3).stdout
    export.write_text('{"index": "4", "description": "rain"}\n{"index": "3", "description": "wind"}\n')
    assert run("import-neuronpedia", folder, export).exit_code == 0
    assert json.loads(run("show", folder, 3, "--json").stdout)["label"] == "wind"


def test_what_cannot_be_opened(folder, tmp_path):
    failed(run("search", "smollm2-135m/absent", "sea"), "is not one that ships (smollm2-135m/l")
    failed(run("search", tmp_path, "sea"), "not a checkpoint of a supported family")
    (folder / "features.sqlite").write_bytes(b"damaged" * 1000)
    for command in (("search", folder, "sea"), ("show", folder, 0)):
        failed(run(*command), "not a readable feature file")


def test_explain_and_eval_say_what_is_wrong(folder, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for command in ("explain", "eval"):
        failed(run(command, folder, "--model", tmp_path, "--text", empty), "no text in")
        failed(run(command, folder, "--model", tmp_path, "--text", tmp_path / "absent"), "cannot be read")
    text = tmp_path / "text.txt"
    text.write_text("Some words. " * 100)
    failed(run("explain", folder, "--model", tmp_path, "--text", text), "not a model that transformers can load")


def test_help_is_complete():
    for command in ("explain", "eval", "search", "show", "label", "import-neuronpedia"):
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert "SAE" in shown.output


def test_texts(tmp_path):
    lines, plain = tmp_path / "a.jsonl", tmp_path / "b.txt"
    lines.write_text('{"text": "one"}\n\n{"text": "two", "source": "s"}\n')
    plain.write_text("three\n\nfour")
    assert read_texts([lines, plain]) == ["one", "two", "three\n\nfour"]
    for bad, says in (("{", "not JSON"), ("[]", "`text`"), ('{"text": 1}', "`text`")):
        lines.write_text('{"text": "one"}\n' + bad)
        with pytest.raises(TextError, match=f"a.jsonl:2: .*{says}"):
            read_texts([lines])
    plain.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(TextError, match=r"b.txt: cannot be read"):
        read_texts([plain])
