"""The kernels against torch: correctness first, then time.

    python -m benchmarks.kernels.run                # on the GPU if there is one, else on the CPU
    python -m benchmarks.kernels.run --device cpu

writes benchmarks/results/kernels_DEVICE.csv, kernels_DEVICE.json (the machine) and kernels_DEVICE.png: fractions of the
roofline on a GPU, ratios to the fastest baseline on a CPU. Every round runs all implementations one after the other;
times are medians over rounds, and `ratio`, with its quartiles, is over rounds of ours to that round of the baseline
whose median is least: below 1 is faster. On a CPU, OMP_NUM_THREADS says how many threads all of them have.

Baselines: eager torch; torch.compile; on a CPU also torch.compile with frozen weights, of which it packs a second copy;
on a GPU also a plain Triton kernel for decoding.

apply_edits: each token has one feature of its own; apply_edits_8: eight; apply_edits_prompt: all tokens are one
request's and share eight, for which a GPU's two forms of the kernel are measured apart (rows_us, blocks_us).
"""

from __future__ import annotations

import csv
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.kernels.baselines import (
    Frozen,
    eager_count,
    eager_decode,
    eager_edit,
    eager_edits,
    eager_prompt,
    eager_threshold,
    eager_topk,
)
from steer_kernels.apply_edits import SiteEdits, StepTable, TableEdits, apply_edits_reference, prepare_edits
from steer_kernels.count_above import count_above, count_above_reference
from steer_kernels.count_above_screened import count_above_screened
from steer_kernels.decode_sparse import decode_sparse, decode_sparse_reference
from steer_kernels.eight_bit import quantise
from steer_kernels.encode_threshold import encode_threshold, encode_threshold_reference
from steer_kernels.encode_topk import encode_topk, encode_topk_reference
from steer_kernels.encode_topk_screened import encode_topk_screened
from steer_kernels.triton_devices import runs_triton

RESULTS = Path(__file__).parents[1] / "results"
INF = float("inf")

# (d_in, d_sae, k) and tokens: issue 5's for GPUs; for CPUs the embedded SAE's and Gemma 2 2B's.
SHAPES = {
    "cuda": [
        (2304, 16_384, 64),
        (2304, 65_536, 64),
        (4096, 32_768, 64),
        (4096, 65_536, 64),
        (4096, 131_072, 64),
        (8192, 65_536, 64),
    ],
    "cpu": [(576, 4_608, 32), (2304, 16_384, 64)],
}
TOKENS = {"cuda": [1, 4, 16, 64, 128, 256, 2048, 8192], "cpu": [1, 4, 16, 64]}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
GIVEN = 8
EDITS = {"apply_edits": 1, "apply_edits_8": 8, "apply_edits_prompt": 8}
"""Features that act on a token, by op."""
CAPACITY_PER_K = 4


@dataclass(frozen=True)
class Inputs:
    """A random SAE and tokens with activations about as sparse as k says."""

    x: torch.Tensor
    encoder: torch.Tensor
    b_enc: torch.Tensor
    threshold: torch.Tensor
    decoder: torch.Tensor
    b_dec: torch.Tensor
    given: torch.Tensor
    k: int

    @staticmethod
    def draw(d_in: int, d_sae: int, k: int, tokens: int, dtype: torch.dtype, device: str) -> Inputs:
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        # Pre-activations are standard normal: the threshold that k of d_sae exceed is their quantile.
        quantile = float(torch.special.ndtri(torch.tensor(1 - k / d_sae)))
        return Inputs(
            x=normal(tokens, d_in).to(dtype),
            encoder=normal(d_sae, d_in).div_(d_in**0.5).to(dtype),
            b_enc=normal(d_sae).mul_(0.01),
            threshold=torch.full((d_sae,), quantile, device=device),
            decoder=normal(d_sae, d_in).div_(d_in**0.5).to(dtype),
            b_dec=normal(d_in),
            given=torch.randint(0, d_sae, (tokens, GIVEN), generator=generator, device=device),
            k=k,
        )


@dataclass(frozen=True)
class Row:
    """Times in microseconds.

    floor_us: reading what must be read at the measured bandwidth, or multiplying at the measured rate, whichever takes
    longer; of_roofline: floor_us over our time. failed_rows: rows with a tile that was run again;
    of a screened op, those for which the encoder was read after all. rows_us, blocks_us: apply_edits' forms, each where
    the other is not launched.
    """

    op: str
    d_in: int
    d_sae: int
    k: int
    tokens: int
    ours_us: float
    eager_us: float
    compiled_us: float
    frozen_us: float | None
    plain_us: float | None
    ratio: float
    ratio_low: float
    ratio_high: float
    floor_us: float | None
    of_roofline: float | None
    workspace_bytes: int | None
    failed_rows: int | None
    rows_us: float | None = None
    blocks_us: float | None = None


def check(device: str) -> None:
    """Every op against its float64 oracle on integers, where they must agree to the bit."""
    generator = torch.Generator().manual_seed(1)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator)

    for tokens, d_in, d_sae, k in ((1, 64, 1000, 20), (37, 96, 4_608, 32), (130, 80, 700, 64)):
        x, W = integers(tokens, d_in).to(DTYPE[device]), integers(d_sae, d_in).to(DTYPE[device])
        b, given = integers(d_sae).float(), torch.randint(-1, d_sae, (tokens, GIVEN), generator=generator)
        threshold = torch.full((d_sae,), 15.0)
        on = [t.to(device) for t in (x, W, b, threshold, given)]
        copy = quantise(on[1])
        eight_bit = (copy.weights, copy.step, copy.slack, copy.longest)
        features, values = torch.randint(-1, d_sae, (tokens, k), generator=generator), integers(tokens, k).float()
        pairs = [
            (encode_topk(*on[:3], k, False, None), encode_topk_reference(x, W, b, k)),
            (encode_topk(*on[:3], k, True, None), encode_topk_reference(x, W, b, k, True)),
            (encode_threshold(*on[:4], k, None), encode_threshold_reference(x, W, b, threshold, k)),
            (count_above(*on[:3], on[4], 0.0, False, None), count_above_reference(x, W, b, given, 0.0)),
            (encode_topk_screened(*on[:3], *eight_bit, k, False, None), encode_topk_reference(x, W, b, k)),
            (count_above_screened(*on[:3], *eight_bit, on[4], k, 0.0, False, None), cut_off(x, W, b, given, k)),
            (
                (decode_sparse(features.to(device), values.to(device), on[1], None, None, None, torch.float32),),
                (decode_sparse_reference(features, values, W, None, None, None),),
            ),
        ]
        for op in EDITS:
            edited, edits = x.to(device, copy=True), features_set(op, tokens, d_sae)
            editing(edits, on[1])(edited)
            pairs.append(((edited,), (apply_edits_reference(x, None, W, edits),)))
        for ours, expected in pairs:
            for one, other in zip(ours, expected, strict=True):
                torch.testing.assert_close(one.cpu().double(), other.double(), rtol=0, atol=0)


def cut_off(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, given: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    p, ahead = count_above_reference(x, W, b, given, 0.0)
    return p, ahead.clamp(max=k)


def features_set(op: str, tokens: int, d_sae: int) -> SiteEdits:
    """Features are set to 4, row j being read and written for feature j: each token's own, or of all the same."""
    n = EDITS[op]
    shared = op == "apply_edits_prompt"
    start = np.zeros(n, np.int64) if shared else np.repeat(np.arange(tokens), n)
    row = np.arange(len(start)) % d_sae
    every, none, neither = np.ones(len(row), np.float32), np.full(len(row), -1), np.zeros(len(row), np.int64)
    return SiteEdits(
        start=start, stop=start + (tokens if shared else 1), read=row, write=row, bias=0 * every, threshold=0 * every,
        scale=0 * every, shift=4 * every, low=-np.inf * every, high=np.inf * every, encoder=none, feature=neither,
        norm=neither, source=none, preserve_norm=np.zeros(len(row), np.bool_), gate=none,
    )  # fmt: skip


def editing(edits: SiteEdits, bank: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """`edits`, those from one token on being one request's, as the engine applies them to a stream on the bank's
    device."""
    if not runs_triton(bank.device):
        prepared = prepare_edits(edits, bank)
        return lambda hidden: prepared.apply(hidden, None)
    table = StepTable(bank, 1)
    table.fill(edits, np.zeros(len(edits), dtype=np.int64), edits.start)
    at_site = TableEdits(table, 0)
    return lambda hidden: at_site.apply(hidden, None)


Implementation = Callable[[], Any]


def contenders(op: str, inputs: Inputs) -> tuple[Implementation, Callable[..., Any], tuple[Any, ...]]:
    """(ours, the baseline, the baseline's arguments)."""
    i = inputs
    if op in EDITS:
        (tokens, d_in), bank = i.x.shape, i.encoder
        edits, edited = features_set(op, tokens, len(bank)), i.x.clone()
        edit, rows = editing(edits, bank), bank[torch.from_numpy(edits.read).to(bank.device)]
        baseline = {"apply_edits": eager_edit, "apply_edits_8": eager_edits, "apply_edits_prompt": eager_prompt}[op]
        rows = rows.view(tokens, -1, d_in) if op == "apply_edits_8" else rows
        return lambda: edit(edited), baseline, (i.x.clone(), rows, rows.clone())
    if op == "encode_topk":
        arguments = (i.x, i.encoder, i.b_enc, i.k)
        return lambda: encode_topk(*arguments, False, None), eager_topk, arguments
    if op in ("encode_topk_screened", "count_above_screened"):
        copy = quantise(i.encoder)
        eight_bit = (i.x, i.encoder, i.b_enc, copy.weights, copy.step, copy.slack, copy.longest)
        if op == "encode_topk_screened":
            return (
                lambda: encode_topk_screened(*eight_bit, i.k, False, None),
                eager_topk,
                (i.x, i.encoder, i.b_enc, i.k),
            )
        return (
            lambda: count_above_screened(*eight_bit, i.given, i.k, -INF, False, None),
            eager_count,
            (i.x, i.encoder, i.b_enc, i.given),
        )
    if op == "encode_threshold":
        capacity = CAPACITY_PER_K * i.k
        return (
            lambda: encode_threshold(i.x, i.encoder, i.b_enc, i.threshold, capacity, None),
            eager_threshold,
            (i.x, i.encoder, i.b_enc, i.threshold),
        )
    if op == "count_above":
        return (
            lambda: count_above(i.x, i.encoder, i.b_enc, i.given, -INF, False, None),
            eager_count,
            (i.x, i.encoder, i.b_enc, i.given),
        )
    values, features = encode_topk(i.x, i.encoder, i.b_enc, i.k, False, None)
    return (
        lambda: decode_sparse(features, values, i.decoder, i.b_dec, None, None, i.x.dtype),
        eager_decode,
        (features, values, i.decoder, i.b_dec),
    )


def implementations(op: str, inputs: Inputs, device: str) -> dict[str, Implementation]:
    torch._dynamo.reset()
    ours, baseline, arguments = contenders(op, inputs)
    compiled = torch.compile(baseline, dynamic=False)
    found = {"ours": ours, "eager": lambda: baseline(*arguments), "compiled": lambda: compiled(*arguments)}
    if device == "cuda" and op == "decode_sparse":
        from benchmarks.kernels.plain_decode import plain_decode

        found["plain"] = lambda: plain_decode(*arguments)
    if device == "cuda" and op == "apply_edits_prompt":
        found |= {"rows": in_form(ours, 1 << 30), "blocks": in_form(ours, 1)}
    if device == "cpu" and op == "encode_topk":
        frozen = torch.compile(Frozen(baseline, arguments[1:]).eval(), dynamic=False, options={"freezing": True})
        found["frozen"] = lambda: frozen(arguments[0])
    return found


def in_form(edit: Implementation, grouped_from: int) -> Implementation:
    """`edit` with the kernel's grouped form launched from so many tokens on."""
    from steer_kernels.apply_edits import triton_kernel

    def run() -> None:
        chosen, triton_kernel.GROUPED_FROM = triton_kernel.GROUPED_FROM, grouped_from
        edit()
        triton_kernel.GROUPED_FROM = chosen

    return run


def cpu_rounds(functions: dict[str, Implementation], seconds: float) -> dict[str, list[float]]:
    """Microseconds of every round, as many rounds as fit, nine at least."""
    for function in functions.values():
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    order = list(functions.items())
    while time.perf_counter() < end or len(times["ours"]) < 9:
        random.shuffle(order)
        for name, function in order:
            # Each finds in the caches what it left there itself, as in a loop over tokens. Else those that share a
            # library would warm its code for each other, and ratios would depend on who else is measured.
            function()
            start = time.perf_counter()
            function()
            times[name].append(1e6 * (time.perf_counter() - start))
    return times


def gpu_rounds(functions: dict[str, Implementation]) -> dict[str, list[float]]:
    """Microseconds of nine rounds; triton.testing empties L2 between runs."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(9):
        for name, function in functions.items():
            times[name].append(1e3 * do_bench(function, warmup=5, rep=20, return_mode="median"))
    return times


def gpu_ceilings() -> tuple[float, float]:
    """(bytes per microsecond read, multiplications and additions per microsecond in bfloat16), measured here."""
    from triton.testing import do_bench

    long = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").view(torch.float32)
    read = long.numel() * 4 / (1e3 * do_bench(lambda: long.sum(), return_mode="median"))
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return read, 2 * 8192**3 / (1e3 * do_bench(lambda: square @ square, return_mode="median"))


def floor_us(op: str, inputs: Inputs, ceilings: tuple[float, float]) -> float:
    tokens, d_in = inputs.x.shape
    if op in EDITS:
        rows = EDITS[op] * (1 if op == "apply_edits_prompt" else tokens)
        return 2 * (tokens + rows) * d_in * inputs.x.element_size() / ceilings[0]
    if op == "decode_sparse":
        return tokens * inputs.k * d_in * inputs.decoder.element_size() / ceilings[0]
    weight_bytes = 1 if op in SCREENED else inputs.encoder.element_size()
    read = inputs.encoder.numel() * weight_bytes + inputs.x.numel() * inputs.x.element_size()
    return max(read / ceilings[0], 2 * tokens * inputs.encoder.numel() / ceilings[1])


def certificate(op: str, inputs: Inputs) -> tuple[int | None, int | None]:
    """(bytes of workspace held, rows with a tile that was run again) of the GPU's kernels."""
    from steer_kernels import workspace

    if op == "encode_topk":
        from steer_kernels.encode_topk.triton_kernel import encode_topk_triton

        failed = int((encode_topk_triton(inputs.x, inputs.encoder, inputs.b_enc, inputs.k).full_tiles > 0).sum())
    elif op == "encode_threshold":
        from steer_kernels.encode_threshold.triton_kernel import encode_threshold_triton

        capacity = CAPACITY_PER_K * inputs.k
        encoded = encode_threshold_triton(inputs.x, inputs.encoder, inputs.b_enc, inputs.threshold, capacity)
        failed = int((encoded.full_tiles > 0).sum())
    elif op == "encode_topk_screened":
        from steer_kernels.encode_topk_screened import triton_kernel as screened

        (tokens, _), d_sae = inputs.x.shape, inputs.encoder.shape[0]
        if not screened.worth_screening(tokens, d_sae, inputs.k):
            return workspace.held_bytes(inputs.x.device), None
        copy = quantise(inputs.encoder)
        found = screened.encode_topk_screened_triton(inputs.x, inputs.encoder, inputs.b_enc, copy, inputs.k)
        failed = int(found.uncertain.sum())
    else:
        return None, None
    return workspace.held_bytes(inputs.x.device), failed


def measure(op: str, inputs: Inputs, device: str, ceilings: tuple[float, float] | None, seconds: float) -> Row:
    functions = implementations(op, inputs, device)
    times = gpu_rounds(functions) if device == "cuda" else cpu_rounds(functions, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    best = min((name for name in times if name not in ("ours", "rows", "blocks")), key=lambda name: median[name])
    ratios = [ours / other for ours, other in zip(times["ours"], times[best], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    floor = None if ceilings is None else floor_us(op, inputs, ceilings)
    workspace_bytes, failed = certificate(op, inputs) if device == "cuda" else (None, None)
    return Row(
        op=op,
        d_in=inputs.x.shape[1],
        d_sae=inputs.encoder.shape[0],
        k=inputs.k,
        tokens=inputs.x.shape[0],
        ours_us=round(median["ours"], 1),
        eager_us=round(median["eager"], 1),
        compiled_us=round(median["compiled"], 1),
        frozen_us=round(median["frozen"], 1) if "frozen" in median else None,
        plain_us=round(median["plain"], 1) if "plain" in median else None,
        ratio=round(statistics.median(ratios), 3),
        ratio_low=round(low, 3),
        ratio_high=round(high, 3),
        floor_us=None if floor is None else round(floor, 1),
        of_roofline=None if floor is None else round(floor / median["ours"], 3),
        workspace_bytes=workspace_bytes,
        failed_rows=failed,
        rows_us=round(median["rows"], 1) if "rows" in median else None,
        blocks_us=round(median["blocks"], 1) if "blocks" in median else None,
    )


def machine(device: str, ceilings: tuple[float, float] | None) -> dict[str, Any]:
    processor = platform.processor()
    if sys.platform == "linux":
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    described: dict[str, Any] = {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "dtype": str(DTYPE[device]),
    }
    if device == "cuda":
        assert ceilings is not None
        described |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "read_gb_per_s": round(ceilings[0] / 1e3),
            "matmul_tflop_per_s": round(ceilings[1] / 1e6),
        }
    return described


def plot(rows: list[Row], path: Path, title: str) -> None:
    """By tokens, a panel an op, a line a shape: the fraction of the roofline, or on a CPU the ratio to a baseline."""
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(row.op for row in rows))
    on_gpu = rows[0].of_roofline is not None
    top = 1.05 if on_gpu else 1.05 * max(1.0, *(row.ratio for row in rows))
    figure = Figure(figsize=(16, 4 * -(-len(ops) // 4)), layout="constrained")
    panels = figure.subplots(-(-len(ops) // 4), 4, sharey=True, squeeze=False).ravel()
    for axes in panels[len(ops) :]:
        axes.remove()
    for axes, op in zip(panels, ops, strict=False):
        for d_in, d_sae in dict.fromkeys((row.d_in, row.d_sae) for row in rows):
            line = [row for row in rows if (row.op, row.d_in, row.d_sae) == (op, d_in, d_sae)]
            tokens = [row.tokens for row in line]
            heights = [row.of_roofline if on_gpu else row.ratio for row in line]
            axes.plot(tokens, heights, marker="o", label=f"{d_in} x {d_sae}")
        axes.set(title=op, xlabel="tokens", xscale="log")
        axes.set_ylim(0, top)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    figure.supylabel("fraction of the measured roofline" if on_gpu else "our time over the fastest baseline's")
    figure.axes[-1].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def cases(device: str, ops: list[str]) -> Iterator[tuple[str, Inputs]]:
    for d_in, d_sae, k in SHAPES[device]:
        for tokens in TOKENS[device]:
            inputs = Inputs.draw(d_in, d_sae, k, tokens, DTYPE[device], device)
            for op in ops:
                yield op, inputs


OPS = [*EDITS, "encode_topk", "encode_threshold", "count_above", "decode_sparse"]
SCREENED = ["encode_topk_screened", "count_above_screened"]
"""The same from eight-bit copies, which a CPU does without. For batches that no screen pays for they are the others."""


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
    op: Annotated[list[str] | None, typer.Option(help="Ops to measure. Default: all of the device's")] = None,
    seconds: Annotated[float, typer.Option(help="On a CPU: time for each op at each shape")] = 4.0,
) -> None:
    console = Console(width=120)
    ops = op or (OPS + SCREENED if device == "cuda" else OPS)
    check(device)
    console.print("Every op equals its float64 oracle.")
    ceilings = gpu_ceilings() if device == "cuda" else None
    described = machine(device, ceilings)
    rows = []
    with torch.inference_mode():
        for name, inputs in cases(device, ops):
            rows.append(measure(name, inputs, device, ceilings, seconds))
            console.print(rows[-1])
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"kernels_{device}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (RESULTS / f"kernels_{device}.json").write_text(json.dumps(described, indent=1) + "\n")
    title = described["gpu"] if device == "cuda" else f"{described['processor']}, {described['threads']} threads"
    plot(rows, RESULTS / f"kernels_{device}.png", title)


if __name__ == "__main__":
    typer.run(main)
