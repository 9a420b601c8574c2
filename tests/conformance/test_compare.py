"""The comparison sees what it has to see, and leaves alone what no library decides."""

import json
import shutil

import torch
from safetensors.torch import save_file

from scripts.install_engine import extra
from tests.conformance.__main__ import FIXTURES, ROOT
from tests.conformance.compare import differences, main, read

SAE_LENS = FIXTURES / "sae_lens"


def rewritten(case, tmp_path, change, file="expected.safetensors"):
    """A copy of a fixture whose `file` went through change(metadata, tensors)."""
    folder = shutil.copytree(SAE_LENS / case, tmp_path / case)
    metadata, tensors = read(folder / file)
    change(metadata, tensors)
    save_file(tensors, folder / file, metadata=metadata)
    return folder


def test_equal_folders():
    for case in SAE_LENS.iterdir():
        assert differences(case, case) == []


def test_a_changed_answer(tmp_path):
    def change(metadata, tensors):
        tensors["activations"][3, 7] += 1e-4

    folder = rewritten("standard", tmp_path, change)
    (found,) = differences(folder, SAE_LENS / "standard")
    assert found.startswith("expected.safetensors: activations differs by")


def test_an_answer_that_is_not_a_number(tmp_path):
    def change(metadata, tensors):
        tensors["reconstruction"][0, 0] = torch.nan

    folder = rewritten("standard", tmp_path, change)
    assert differences(folder, SAE_LENS / "standard") == ["expected.safetensors: reconstruction differs by nan"]


def test_another_library_version(tmp_path):
    folder = rewritten("standard", tmp_path, lambda metadata, tensors: metadata.update(version="7.0.0"))
    (found,) = differences(folder, SAE_LENS / "standard")
    assert "version is '7.0.0'" in found


def test_which_of_two_tied_features_won_is_nobodys_business(tmp_path):
    def change(metadata, tensors):
        row = json.loads(metadata["ambiguous_rows"])[0]
        for first, second in json.loads(metadata["tied_features"]):
            tensors["activations"][row, [first, second]] = tensors["activations"][row, [second, first]]
        tensors["reconstruction"][row] += 1.0

    folder = rewritten("topk", tmp_path, change)
    assert differences(folder, SAE_LENS / "topk") == []


def test_a_renamed_tensor_of_the_checkpoint(tmp_path):
    file = "blocks.3.hook_resid_post/sae_weights.safetensors"
    folder = rewritten("gated", tmp_path, lambda _, tensors: tensors.update(b_gates=tensors.pop("b_gate")), file)
    (found,) = differences(folder, SAE_LENS / "gated")
    assert found.startswith(file)


def test_files_and_cases_that_come_and_go(tmp_path, capsys):
    folder = shutil.copytree(SAE_LENS / "gated", tmp_path / "sae_lens" / "gated")
    (folder / "blocks.3.hook_resid_post" / "cfg.json").unlink()
    (folder / "more.json").write_text("{}")
    assert differences(folder, SAE_LENS / "gated") == [
        "more.json is new",
        "blocks.3.hook_resid_post/cfg.json is not written any more",
    ]
    assert main(tmp_path / "sae_lens", SAE_LENS) == 1
    printed = capsys.readouterr().out
    assert next(line for line in printed.splitlines() if "standard_trained" in line).endswith("not written any more")
    assert main(SAE_LENS, SAE_LENS) == 0


def test_the_extra_has_the_versions_that_wrote_the_fixtures():
    pinned = (ROOT / "tests" / "conformance" / "requirements-sae-lens.txt").read_text().splitlines()
    assert extra("conformance")
    assert set(extra("conformance")) <= set(pinned)
