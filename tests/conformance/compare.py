"""Fixtures written now against the committed ones: `python -m tests.conformance.compare NEW COMMITTED`.

Both are folders of one family. Prints a line for each case and exits with 1 where one differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open

from tests.conformance.table import say

TOLERANCE = 1e-6
"""Of a value, relative to the largest of its row (at least 1)."""

TIE = 1e-3
"""Tied features whose activations differ by more were not both chosen."""

ANSWERS = ("", "saelens_", "loaded_")
DEPENDS_ON_TIES = {"ambiguous_rows"}


def read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(metadata, tensors) of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def differences(new: Path, committed: Path) -> list[str]:
    """What differs between two folders of one case, in words; empty where nothing does."""
    files, before = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (new, committed)
    )
    found = [f"{name} is new" for name in sorted(files - before)]
    found += [f"{name} is not written any more" for name in sorted(before - files)]
    for name in sorted(files & before):
        of_file = expected_differences if name.startswith("expected") else checkpoint_differences
        found += [f"{name}: {difference}" for difference in of_file(new / name, committed / name)]
    return found


def checkpoint_differences(new: Path, committed: Path) -> list[str]:
    """A configuration has to be equal; of weights, the tensors' names, shapes and dtypes. The answers show the rest."""
    contents = [_contents(path) for path in (new, committed)]
    return [] if contents[0] == contents[1] else [f"{contents[0]} instead of {contents[1]}"]


def _contents(path: Path) -> Any:
    if path.suffix == ".safetensors":
        tensors = read(path)[1]
    elif path.suffix in {".pt", ".pth"}:
        tensors = torch.load(path, weights_only=True)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            tensors = {name: torch.from_numpy(archive[name]) for name in archive.files}
    else:
        # JSON is YAML as well.
        return yaml.safe_load(path.read_text())
    return {name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(tensors.items())}


def expected_differences(new: Path, committed: Path) -> list[str]:
    """Metadata and x have to be equal, answers within `TOLERANCE`; rows in which a tie decides are left out."""
    (metadata, tensors), (old_metadata, old_tensors) = read(new), read(committed)
    found = [
        f"{key} is {metadata.get(key)!r} instead of {old_metadata.get(key)!r}"
        for key in sorted((metadata.keys() | old_metadata.keys()) - DEPENDS_ON_TIES)
        if metadata.get(key) != old_metadata.get(key)
    ]
    shapes, old_shapes = (
        {name: list(tensor.shape) for name, tensor in sorted(group.items())} for group in (tensors, old_tensors)
    )
    if shapes != old_shapes:
        return [*found, f"tensors {shapes} instead of {old_shapes}"]
    if "x" in tensors and not torch.equal(tensors["x"], old_tensors["x"]):
        found.append("x differs")
    ties = json.loads(metadata.get("tied_features", "[]"))
    for answer in ANSWERS:
        active = f"{answer}activations"
        if active not in tensors:
            continue
        clear = ~(_tie_decides(tensors[active], ties) | _tie_decides(old_tensors[active], ties))
        for name in (active, f"{answer}reconstruction"):
            size = old_tensors[name].abs().amax(dim=1, keepdim=True).clamp(min=1.0)
            error = ((tensors[name] - old_tensors[name]).abs() / size)[clear].max().item()
            if not error <= TOLERANCE:
                found.append(f"{name} differs by {error:.1e}")
    return found


def _tie_decides(activations: torch.Tensor, ties: list[tuple[int, int]]) -> torch.Tensor:
    decides = torch.zeros(len(activations), dtype=torch.bool)
    for first, second in ties:
        decides |= (activations[:, first] - activations[:, second]).abs() > TIE
    return decides


def library(case: Path) -> str:
    """Name and version of the library that wrote a case."""
    metadata, _ = read(min(case.glob("expected*.safetensors")))
    return f"{metadata['library']} {metadata['version']}"


def main(new: Path, committed: Path) -> int:
    cases, before = ({path.name for path in folder.glob("*/")} for folder in (new, committed))
    failed = False
    for case in sorted(cases | before):
        if case in cases & before:
            found = differences(new / case, committed / case)
        else:
            found = ["not committed" if case in cases else "not written any more"]
        written = new if case in cases else committed
        say(new.name, case, library(written / case), "; ".join(found) or "ok")
        failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2])))
