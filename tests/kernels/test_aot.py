"""The Triton kernels compile for GPUs that are not here, and fit them."""

import json

import pytest

from benchmarks.kernels.aot import ARCHITECTURES, RESULTS, compile_for, launches
from tests.kernels.conftest import INTERPRETED

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels cannot be compiled"),
]

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def name(launch):
    return f"{launch.op}-{launch.kernel.__name__.lstrip('_')}-{launch.shape}".replace(" ", "")


@pytest.mark.parametrize("launch", list(launches(BY_NAME["sm_90"])), ids=name)
def test_fits_sm_90(launch):
    compiled = compile_for(launch, BY_NAME["sm_90"])
    assert compiled.spilled_bytes == 0
    assert compiled.shared_bytes <= compiled.shared_limit
    # Products of a tile of 64 tokens and more go to Hopper's own matrix units, smaller ones to Ampere's.
    if launch.op == "apply_edits":
        assert compiled.matrix_instruction == ("mma.sync" if launch.shape == "blocks, bf16" else "")
    elif "bf16" in launch.shape and "TOKENS" in launch.constants:
        wide = launch.constants["TOKENS"] >= 64
        assert compiled.matrix_instruction == ("wgmma.mma_async" if wide else "mma.sync")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    "shape",
    [
        "64 tokens, bf16",
        "64 tokens, bf16, int8",
        "d_sae 65536, k 64",
        "d_sae 65536",
        "bf16",
        "rows, bf16",
        "blocks, bf16",
    ],
)
def test_compiles_elsewhere(architecture, shape):
    target = BY_NAME[architecture]
    chosen = [launch for launch in launches(target) if launch.shape == shape]
    assert chosen
    for launch in chosen:
        compiled = compile_for(launch, target)
        assert compiled.registers > 0
        assert compiled.shared_bytes <= compiled.shared_limit, compiled


def test_the_committed_table_is_of_these_kernels():
    record = json.loads((RESULTS / "kernels_aot.json").read_text())
    expected = {
        (launch.op, launch.kernel.__name__, launch.shape, architecture.name)
        for architecture in ARCHITECTURES
        for launch in launches(architecture)
    }
    rows = record["kernels"]
    assert {(row["op"], row["kernel"], row["shape"], row["architecture"]) for row in rows} == expected
    assert (RESULTS / "kernels_aot.md").read_text().count("\n| ") == len(rows) + 1
