"""`steer-server sae inspect`, as typed."""

import json

import pytest
import torch
from typer.testing import CliRunner

from sae_models import load
from steer_server.cli import app
from tests.sae_models.build import build_sae
from tests.sae_models.conformance import FIXTURES


def inspect(*arguments):
    return CliRunner().invoke(app, ["sae", "inspect", *map(str, arguments)])


def failed(result, message):
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), "a traceback"
    assert message in " ".join(result.stderr.split())


def facts(*arguments):
    result = inspect(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_everything_about_a_jumprelu(tmp_path):
    tensors = {
        "W_dec": torch.diag_embed(torch.arange(1.0, 9.0)).repeat(3, 1),
        "threshold": torch.linspace(0.5, 1.65, 24),
        "W_enc": torch.randn(8, 24).half(),
    }
    folder = build_sae(tmp_path / "my sae", "jumprelu", tensors=tensors)
    found = facts(folder)
    assert found == {
        "name": "my sae",
        "family": "SAELens",
        "version": "3 to 6",
        "architecture": "jumprelu",
        "d_in": 8,
        "d_out": 8,
        "d_sae": 24,
        "k": None,
        "reads": [{"hook_point": "blocks.1.hook_resid_post", "armable": True}],
        "writes": [{"hook_point": "blocks.1.hook_resid_post", "armable": True}],
        "token_norm": "none",
        "model": "test-model",
        "skip_first": 0,
        "dtype": "float16",
        "files": [
            {
                "path": str(folder / "sae_weights.safetensors"),
                "bytes": (folder / "sae_weights.safetensors").stat().st_size,
            }
        ],
        "sha256": load(folder).sha256,
        "decoder_norms": {"min": 1.0, "median": 4.0, "max": 8.0},
        "thresholds": {
            "min": pytest.approx(0.5), "median": pytest.approx(1.05, abs=1e-3), "max": pytest.approx(1.65),
            "never_on": 0,
        },
        "serve": f"steer-server serve test-model --sae 'my-sae={folder}'",
    }  # fmt: skip


def test_for_people(tmp_path):
    shown = inspect(build_sae(tmp_path / "s", "topk", k=4)).stdout
    for line in (
        "architecture:  topk, k 4",
        "features:      24",
        "reads:         blocks.1.hook_resid_post",
        "thresholds:    none",
        f"serve it:      steer-server serve test-model --sae s={tmp_path / 's'}",
    ):
        assert line in shown.splitlines()
    assert "writes:" not in shown


def test_a_shipped_sae_by_name():
    found = facts("smollm2-135m/l15")
    assert (found["k"], found["d_sae"], found["skip_first"]) == (32, 4608, 1)
    assert found["serve"] == "steer-server serve HuggingFaceTB/SmolLM2-135M-Instruct"


def test_options_behind_the_path(tmp_path):
    folder = build_sae(tmp_path / "s", "topk", k=8)
    found = facts(f"{folder}?k=3&hook=model.layers.4.mlp")
    assert (found["k"], found["reads"]) == (3, [{"hook_point": "blocks.4.hook_mlp_out", "armable": True}])
    assert found["serve"] == f"steer-server serve test-model --sae 's={folder}?k=3&hook=model.layers.4.mlp'"


def test_a_place_that_the_engine_cannot_arm(tmp_path):
    folder = build_sae(tmp_path / "s", cfg={"metadata": {"hook_name": "blocks.4.attn.hook_z"}})
    found = facts(folder)
    assert (found["reads"], found["serve"], found["model"]) == (
        [{"hook_point": "blocks.4.attn.hook_z", "armable": False}],
        None,
        None,
    )
    shown = inspect(folder).stdout
    assert "reads:         blocks.4.attn.hook_z (the engine has no site there)" in shown
    assert "serve it:      not possible, the engine has no site there" in shown


def test_a_transcoder_writes_elsewhere():
    folder = FIXTURES / "sae_lens" / "skip_transcoder" / "blocks.3.ln2.hook_normalized"
    found = facts(folder)
    assert [p["hook_point"] for p in found["reads"] + found["writes"]] == [
        "blocks.3.ln2.hook_normalized",
        "blocks.3.hook_mlp_out",
    ]
    assert "writes:        blocks.3.hook_mlp_out" in inspect(folder).stdout


def test_what_the_loader_says(tmp_path):
    folder = build_sae(tmp_path / "s", tensors={"b_dec": torch.zeros(9)})
    failed(inspect(folder), "b_dec has shape [9], expected [8]")
    failed(inspect("smollm2-135m/absent"), "is not one that ships (smollm2-135m/l12, smollm2-135m/l15):")
    pickle = FIXTURES / "goodfire" / "llama_8b" / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    failed(inspect(pickle), f"Convert it once: steer-server sae convert '{pickle}' OUT, then load OUT")
    failed(inspect(f"{build_sae(tmp_path / 't')}?k=3"), "option k=3 has no use for this checkpoint")
    unknown = tmp_path / "weights.bin"
    unknown.write_bytes(b"")
    failed(inspect(unknown), "is a pickle, which can run code when it is opened")
