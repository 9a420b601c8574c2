"""A checkpoint of any family, written again as SAELens safetensors, which the server reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sae_models import SAE, LoadOptions, SAEFormatError, load

DTYPES = ("float32", "bfloat16", "float16")


class ConvertError(ValueError):
    """A checkpoint that cannot be converted, or a place that it cannot be written to."""


@dataclass(frozen=True)
class Converted:
    """sae: as read back from where it was written. family: the format it came in."""

    sae: SAE
    family: str


def convert(path: Path, out: Path, options: LoadOptions, dtype: str, progress: Callable[[int, int], None]) -> Converted:
    """Write the SAE at `path` to the new folder `out`, which appears whole or not at all.

    A process of its own reads the checkpoint, because unpickling can run code; this one reads what it wrote. dtype: of
    the written tensors, one of DTYPES. progress: told of (features written, d_sae). Raises ConvertError.
    """
    if os.path.lexists(out):
        raise ConvertError(f"{out} exists; name a folder that does not")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            written = Path(temporary) / out.name
            family = _in_a_process(path, written, options, dtype, progress)
            try:
                load(written)
            except SAEFormatError as error:
                raise ConvertError(f"as {dtype} it cannot be read again: {error}") from None
            written.rename(out)
    except OSError as error:
        raise ConvertError(f"{out} cannot be written: {error}") from None
    return Converted(load(out), family)


def _in_a_process(path: Path, out: Path, options: LoadOptions, dtype: str, progress: Callable[[int, int], None]) -> str:
    """Run `convert_pickle`; the family it found."""
    command = [sys.executable, "-W", "ignore", "-m", "steer_server.sae.convert_pickle", str(path), str(out)]
    command += [json.dumps(options.given()), dtype]
    # -m would look for modules in the current folder first, which may be one full of downloads.
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    message: dict[str, str] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                if "done" in told:
                    progress(told["done"], told["of"])
                else:
                    message = told
        except BaseException:
            process.kill()
            raise
    if "error" in message:
        raise ConvertError(message["error"])
    if "family" not in message:
        raise ConvertError(f"{path}: the process that reads it ended with status {process.returncode}")
    return message["family"]
