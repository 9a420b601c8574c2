"""Read a checkpoint, pickled or not, and write it as SAELens safetensors: `steer-server sae convert`'s own process.

The one module that opens pickles. Nothing imports it: it is run as `python -m`, lives for one file, and unpickles
tensors, numbers and strings only (`weights_only=True`). It writes JSON lines to stdout: `{"done": n, "of": n}` as it
goes, and `{"family": ...}` or `{"error": ...}` at the end.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

import torch

from sae_models import LoadOptions, SAEFormatError, load
from sae_models.saelens_writer import save_saelens
from sae_models.tensor_source import LoadedTensors


def open_pickle(path: Path) -> LoadedTensors:
    """The tensors in a file that `torch.save` wrote. Raises SAEFormatError where it holds anything that could run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # torch raises whatever its reader of damaged files stumbles over.
    except Exception as error:
        found = re.search(r"GLOBAL [\w.]+", str(error))
        if found:
            raise SAEFormatError(
                f"{path}: holds more than tensors, numbers and strings ({found[0]}); nothing in it was run"
            ) from None
        raise SAEFormatError(f"{path}: not a file that torch.save wrote, or damaged ({_reason(error)})") from None
    return LoadedTensors(path, state)


def _reason(error: Exception) -> str:
    """One line of torch's message, without its advice to open the file all the same."""
    line = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return type(error).__name__ if line.startswith("Weights only") else f"{type(error).__name__}: {line}"


def main(path: str, out: str, options: str, dtype: str) -> int:
    """Convert the SAE at `path` into folder `out`. options: JSON of LoadOptions. The process's exit status."""

    def tell(**message: object) -> None:
        print(json.dumps(message), flush=True)  # noqa: T201

    try:
        sae = load(Path(path), LoadOptions(**json.loads(options)), open_pickle)
        save_saelens(sae, Path(out), getattr(torch, dtype), lambda done, of: tell(done=done, of=of))
    except (SAEFormatError, OSError) as error:
        tell(error=str(error))
        return 1
    tell(family=sae.family)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
