"""Copies of fixtures with something in them changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def copied(source: Path, target: Path, config_file: str | None = None, tensors=None, config=None) -> Path:
    """`target`, a copy of folder `source` with some tensors and configuration keys replaced, or, by None, left out."""
    shutil.copytree(source, target)
    (weights,) = (path for path in target.rglob("*") if path.suffix in (".npz", ".safetensors"))
    if tensors:
        rewrite(weights, tensors)
    if config:
        path = target / config_file
        merged = json.loads(path.read_text()) | config
        path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return target


def rewrite(weights: Path, tensors) -> None:
    if weights.suffix == ".npz":
        with np.load(weights) as archive:
            state = {name: torch.from_numpy(archive[name]) for name in archive.files}
        changed = {name: value for name, value in (state | tensors).items() if value is not None}
        np.savez(weights, **{name: value.numpy() for name, value in changed.items()})
        return
    changed = {name: value for name, value in (load_file(weights) | tensors).items() if value is not None}
    save_file(changed, weights)
