"""What a large SAE costs a process: memory and time to open one and read the rows of a few of its features.

It writes an SAE of 131,072 features on a stream of 4,096 in SAELens' layout, 2 GiB in float16, opens it in processes of
their own and compares each with what it was after importing sae_models. Run it with: python benchmarks/large_sae.py
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
GOAL_BYTES, GOAL_SECONDS = 100e6, 1.0


def write_large_sae(folder: Path, d_in: int, d_sae: int) -> int:
    """A JumpReLU SAE of random float16 weights, written in bounded memory; the size of its weights in bytes."""
    shapes = {"W_dec": (d_sae, d_in), "W_enc": (d_in, d_sae), "b_dec": (1, d_in), "b_enc": (1, d_sae)}
    shapes["threshold"] = (1, d_sae)
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        shape = [columns] if rows == 1 else [rows, columns]
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 2 * rows * columns]}
        end += 2 * rows * columns
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    random = np.random.default_rng(0)
    # Drawing two billion numbers takes minutes; a window that moves over a few gives rows that differ.
    pool = (random.standard_normal(1 << 22) / d_in**0.5).astype(np.float16)
    with (folder / "sae_weights.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (rows, columns) in shapes.items():
            values = np.abs(pool) if name == "threshold" else pool
            for _ in range(rows):
                start = int(random.integers(len(pool) - columns))
                file.write(values[start : start + columns].data)
    config = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"model_name": "none", "hook_name": "blocks.0.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return (folder / "sae_weights.safetensors").stat().st_size


def memory() -> dict[str, int]:
    """Bytes of this process now (VmRSS), by kind, and at most since the last `forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def bytes_read() -> int:
    """What this process has read from files so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def use(folder: Path, features: list[int]) -> None:
    """In a process of its own: prints what opening the SAE and reading these features' rows adds, as JSON."""
    start = time.perf_counter()
    import sae_models

    imported = time.perf_counter()
    forget_peak()
    before, read_before = memory(), bytes_read()
    sae = sae_models.load(folder)
    opened = time.perf_counter()
    rows = [sae.rows(feature) for feature in features]
    done = time.perf_counter()
    after, read_after = memory(), bytes_read()
    answer = {
        "import_seconds": imported - start,
        "import_bytes": before["VmRSS"],
        "open_seconds": opened - imported,
        "rows_seconds": done - opened,
        "seconds": done - imported,
        "peak_added_bytes": after["VmHWM"] - before["VmRSS"],
        "anonymous_added_bytes": after["RssAnon"] - before["RssAnon"],
        "mapped_added_bytes": after["RssFile"] - before["RssFile"],
        "read_bytes": read_after - read_before,
        "checksum": float(sum(row.encoder.sum() + row.decoder.sum() for row in rows)),
    }
    print(json.dumps(answer))


def used(folder: Path, features: list[int], cache: Path) -> dict[str, Any]:
    """The answer of a process that did `use`. cache: where derived files are kept."""
    command = [sys.executable, __file__, "--as-process", str(folder), "--features", ",".join(map(str, features))]
    environment = os.environ | {"STEER_SERVER_CACHE": str(cache)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return json.loads(ran.stdout)


def forget_pages(folder: Path) -> None:
    """Take a folder's files out of the page cache, as after a restart of the machine."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(
    d_in: Annotated[int, typer.Option(help="Width of the stream.")] = 4096,
    d_sae: Annotated[int, typer.Option(help="Features.")] = 131_072,
    count: Annotated[int, typer.Option(help="Features whose rows are read.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Processes after the first.")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    as_process: Annotated[Path | None, typer.Option(hidden=True)] = None,
    features: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Memory and time that a large SAE adds to a process, at first use and afterwards."""
    if as_process is not None:
        use(as_process, [int(feature) for feature in features.split(",")])
        return
    # The folder of this file, not the project's root, is what Python looks in.
    from serving_overhead import machine

    console = Console()
    chosen = [int(feature) for feature in np.linspace(0, d_sae - 1, count)]
    with tempfile.TemporaryDirectory(prefix="large-sae-") as temporary:
        folder, cache = Path(temporary) / "sae", Path(temporary) / "cache"
        folder.mkdir()
        size = write_large_sae(folder, d_in, d_sae)
        console.print(f"{d_sae:,} x {d_in:,} in float16, {size / 2**30:.2f} GiB of weights")
        runs = {"first use": [used(folder, chosen, cache)]}
        runs["afterwards"] = [used(folder, chosen, cache) for _ in range(rounds)]
        runs["afterwards, nothing in the page cache"] = []
        for _ in range(rounds):
            forget_pages(Path(temporary))
            runs["afterwards, nothing in the page cache"].append(used(folder, chosen, cache))
        derived = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    assert len({run["checksum"] for kind in runs.values() for run in kind}) == 1
    table = Table("", "seconds", "peak added, MB", "anonymous, MB", "mapped, MB", "read, MB", title="a large SAE")
    for name, kind in runs.items():
        median = {key: statistics.median(run[key] for run in kind) for key in kind[0]}
        sizes = ("peak_added_bytes", "anonymous_added_bytes", "mapped_added_bytes", "read_bytes")
        table.add_row(name, f"{median['seconds']:.3f}", *(f"{median[key] / 1e6:.1f}" for key in sizes))
    console.print(table)
    warm = runs["afterwards"]
    met = all(run["peak_added_bytes"] < GOAL_BYTES and run["seconds"] < GOAL_SECONDS for run in warm)
    verdict = "met" if met else "MISSED"
    console.print(f"goals (< {GOAL_BYTES / 1e6:.0f} MB, < {GOAL_SECONDS:.0f} s after the first use): {verdict}")
    record = {
        "machine": machine(),
        "d_in": d_in,
        "d_sae": d_sae,
        "features": count,
        "weights_bytes": size,
        "row_file_bytes": derived,
        "goal_bytes": GOAL_BYTES,
        "goal_seconds": GOAL_SECONDS,
        "goals_met": met,
        "processes": runs,
    }
    target = out or RESULTS / "large_sae.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written to {target}")


if __name__ == "__main__":
    typer.run(main)
