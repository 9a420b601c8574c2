"""Rows per second of `steer-server batch` against `vllm run-batch`, on the same file, and the memory of both over time.

Each round runs vLLM's own runner and then ours, unsteered, with the same flags; ours also runs the same rows steered.
Seconds are of the rows alone where the runners say so, and of the whole command. vLLM's runner takes chat rows only, so
the file has no others. Run it with: python benchmarks/batch_throughput.py
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from serving_overhead import machine

RESULTS = Path(__file__).parent / "results"
SAMPLE_SECONDS = 0.25
GOAL = 1.0
STEERING = {"features": [{"sae": "smollm2-135m/l15", "index": 4290, "op": "set", "value": 59}]}


@dataclass(frozen=True)
class Run:
    """rows_seconds: from the first row to the last. memory: (seconds since the start, MiB of the runner, MiB in all).

    The runner is the process that reads, schedules and writes; "in all" has the engine's processes too.
    """

    runner: str
    command_seconds: float
    rows_seconds: float
    rows: int
    memory: list[tuple[float, float, float]]


def write_input(path: Path, rows: int, tokens: int, steering: dict[str, Any] | None) -> None:
    with path.open("w") as file:
        for i in range(rows):
            messages = [{"role": "user", "content": f"Write one sentence about the number {i}."}]
            body: dict[str, Any] = {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": tokens}
            body["ignore_eos"] = True
            if steering is not None:
                body["steering"] = steering
            row = {"custom_id": f"row-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(row) + "\n")


def resident(pid: int) -> float:
    """MiB of memory of its own."""
    try:
        fields = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"RssAnon:\s+(\d+) kB", fields)
    return int(found[1]) / 1024 if found else 0.0


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == pid:
            child = int(stat.parent.name)
            found += [child, *children(child)]
    return found


def measured(runner: str, command: list[str], environment: dict[str, str], output: Path, log: Path) -> Run:
    start = time.monotonic()
    memory: list[tuple[float, float, float]] = []
    with log.open("w") as sink:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=sink, stderr=subprocess.STDOUT)
        while process.poll() is None:
            own = resident(process.pid)
            memory.append((time.monotonic() - start, own, own + sum(map(resident, children(process.pid)))))
            time.sleep(SAMPLE_SECONDS)
    seconds = time.monotonic() - start
    if process.returncode:
        raise RuntimeError(f"{runner} exited with {process.returncode}; see {log}")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    if any(row["response"]["status_code"] != 200 for row in rows):
        raise RuntimeError(f"{runner}: a row failed; see {output}")
    return Run(runner, seconds, rows_seconds(log.read_text()), len(rows), memory)


def rows_seconds(log: str) -> float:
    """What the runner says of itself: our summary, or the last line of vLLM's progress bar."""
    summaries = [json.loads(line) for line in log.splitlines() if line.startswith('{"event": "summary"')]
    if summaries:
        return float(summaries[-1]["seconds"])
    # vLLM's bar counts whole seconds; its rate, on the same line, is finer.
    (*_, rate) = re.findall(r"100% Completed \| (\d+)/\d+ \[[\d:]+<[\d:]+, +([\d.]+)(req/s|s/req)\]", log)
    count, value, unit = int(rate[0]), float(rate[1]), rate[2]
    return count / value if unit == "req/s" else count * value


def main(
    rows: Annotated[int, typer.Option(help="Rows of the file.")] = 400,
    tokens: Annotated[int, typer.Option(help="Tokens that each row generates.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results; the plot lies beside it.")] = None,
) -> None:
    """Rows per second beside vLLM's own batch runner, as ratios measured in the same round."""
    from steer_server.embedded_model import embedded_model

    model = str(embedded_model())
    flags = ["--served-model-name", "smollm2", "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
    vllm_cli = [sys.executable, "-m", "steer_server.engine.vllm_compat.vllm_cli"]
    console = Console()
    kinds = ("vllm run-batch", "steer-server batch", "steer-server batch, steered")
    runs: dict[str, list[Run]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_input(folder / "plain.jsonl", rows, tokens, None)
        write_input(folder / "steered.jsonl", rows, tokens, STEERING)
        for index in range(rounds):
            for kind in kinds:
                console.print(f"round {index + 1} of {rounds}: {kind}")
                output = folder / f"{index}-{kinds.index(kind)}.jsonl"
                source = folder / ("steered.jsonl" if kind.endswith("steered") else "plain.jsonl")
                if kind == "vllm run-batch":
                    command = [*vllm_cli, "run-batch", "-i", str(source), "-o", str(output), "--model", model, *flags]
                    environment = {"VLLM_PLUGINS": ""}
                else:
                    command = [sys.executable, "-m", "steer_server.cli", "batch", "-i", str(source), "-o", str(output)]
                    command += [model, *flags, "--log-format", "json"]
                    environment = {}
                log = folder / f"{output.stem}.log"
                runs[kind].append(measured(kind, command, environment, output, log))
    report(console, runs, rows, tokens, out or RESULTS / "batch_throughput.json")


def report(console: Console, runs: dict[str, list[Run]], rows: int, tokens: int, target: Path) -> None:
    base = runs["vllm run-batch"]
    table = Table("", "rows/s", "ratio to vLLM", "min .. max", "whole command, s", "runner, peak MiB")
    record: dict[str, Any] = {"machine": machine(), "rows": rows, "tokens_per_row": tokens, "goal": GOAL, "runs": {}}
    for kind, found in runs.items():
        ratios = [b.rows_seconds / r.rows_seconds for b, r in zip(base, found, strict=True)]
        rates = [r.rows / r.rows_seconds for r in found]
        peaks = [max(own for _, own, _ in r.memory) for r in found]
        table.add_row(
            kind,
            f"{statistics.median(rates):.2f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} .. {max(ratios):.3f}",
            f"{statistics.median(r.command_seconds for r in found):.1f}",
            f"{statistics.median(peaks):.0f}",
        )
        record["runs"][kind] = {
            "rows_per_second": [round(rate, 3) for rate in rates],
            "ratio_to_vllm": [round(ratio, 4) for ratio in ratios],
            "median_ratio": round(statistics.median(ratios), 4),
            "command_seconds": [round(r.command_seconds, 2) for r in found],
            "runner_peak_mib": [round(peak, 1) for peak in peaks],
        }
    console.print(table)
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    plot(runs, target.with_suffix(".png"))
    console.print(f"written to {target} and {target.with_suffix('.png')}")


def plot(runs: dict[str, list[Run]], target: Path) -> None:
    """Memory of the runner's process over time, in the last round."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharex=True)
    for kind, found in runs.items():
        seconds, own, everything = zip(*found[-1].memory, strict=True)
        left.plot(seconds, own, label=kind)
        right.plot(seconds, everything, label=kind)
    left.set(title="the runner's process", xlabel="seconds", ylabel="MiB of its own (RssAnon)", ylim=(0, None))
    right.set(title="with the engine's processes", xlabel="seconds", ylim=(0, None))
    left.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    typer.run(main)
