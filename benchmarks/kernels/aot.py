"""Compile every Triton kernel for GPUs that are not here, and table what the compilers say of them.

    python -m benchmarks.kernels.aot

writes benchmarks/results/kernels_aot.json and .md: registers, spills and shared memory of each kernel on each
architecture at the shapes that the engine launches. Spills are what ptxas (NVIDIA) and LLVM (AMD) report; nothing here
ran on a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from steer_kernels.apply_edits import membership
from steer_kernels.apply_edits import triton_kernel as apply_edits
from steer_kernels.count_above import triton_kernel as count_above
from steer_kernels.count_above.triton_kernel import MAX_GIVEN
from steer_kernels.count_above_screened import triton_kernel as count_screened
from steer_kernels.decode_sparse import triton_kernel as decode_sparse
from steer_kernels.encode_threshold import triton_kernel as encode_threshold
from steer_kernels.encode_topk import triton_kernel as encode_topk
from steer_kernels.encode_topk_screened import triton_kernel as screened
from steer_kernels.tile_shapes import FEATURES, slots_per_tile, tile_shape

RESULTS = Path(__file__).parents[1] / "results"

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Architecture:
    """shared_limit: bytes of shared memory that one program can have, from the vendors' tuning guides.

    CUDA C Programming Guide, technical specifications per compute capability (maximum per thread block); CDNA3 ISA:
    64 KiB of LDS a compute unit.
    """

    name: str
    target: GPUTarget
    shared_limit: int


ARCHITECTURES = (
    Architecture("sm_80", GPUTarget("cuda", 80, 32), 163 << 10),
    Architecture("sm_90", GPUTarget("cuda", 90, 32), 227 << 10),
    Architecture("sm_100", GPUTarget("cuda", 100, 32), 227 << 10),
    Architecture("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10),
)


@dataclass(frozen=True)
class Launch:
    """A kernel as its launcher compiles it. constants: constexpr values; types: those of its other arguments."""

    kernel: Any
    op: str
    shape: str
    constants: dict[str, Any]
    types: dict[str, str]
    warps: int
    stages: int


@dataclass(frozen=True)
class Compiled:
    op: str
    kernel: str
    shape: str
    architecture: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    warps: int
    matrix_instruction: str


def launches(architecture: Architecture) -> Iterator[Launch]:
    """What the engine launches on a large SAE: decode of few and of 64 requests, and prefill, in bfloat16 and float32.

    float16 compiles to the same instructions as bfloat16 but for their type.
    """
    backend = architecture.target.backend
    for dtype, name in TYPES.items():
        stream = {"hidden_ptr": f"*{name}", "residual_ptr": f"*{name}", "bank_ptr": f"*{name}", "limit": "fp32"}
        for grouped, form in ((False, "rows"), (True, "blocks")):
            meta = apply_edits.launch_meta(grouped, 4096, dtype, backend)
            how = dict(warps=meta.pop("num_warps"), stages=meta.pop("num_stages"))
            constants = dict(HAS_RESIDUAL=True, HAS_RANKED=True, BLOCK=apply_edits.BLOCK) | meta
            yield Launch(apply_edits._apply_edits, "apply_edits", f"{form}, {name}", constants, stream, **how)
    asked = dict(EDITS=membership.EDITS)
    yield Launch(membership._asked_features, "apply_edits", "membership", asked, {}, warps=1, stages=3)
    ranks = dict(HAS_PROBABILITY=True, COLUMNS=membership.MAX_RANKED)
    floats = dict.fromkeys(["p_ptr", "probability_ptr", "pre_act_ptr", "survival_ptr"], "*fp32")
    yield Launch(membership._keep_ranks, "apply_edits", "membership", ranks, floats, warps=1, stages=3)
    d_sae, k = 65_536, 64
    slots = encode_topk.default_slots(d_sae, k)
    n_tiles = triton.cdiv(d_sae, FEATURES)
    select = encode_topk.select_meta(n_tiles * slots, n_tiles, k)
    for tokens in (1, 64, 2048):
        for dtype, name in TYPES.items():
            tile = tile_shape(tokens, dtype, backend)
            shape = f"{tokens} tokens, {name}"
            encoder = {"x_ptr": f"*{name}", "encoder_ptr": f"*{name}"}
            constants = dict(HAS_SCALE=True, TOKENS=tile.tokens, FEATURES=FEATURES, INNER=tile.inner)
            how = dict(warps=tile.warps, stages=tile.stages)
            topk, unions = constants | dict(ABSOLUTE=True), triton.next_power_of_2(k + FEATURES)
            again = topk | dict(UNION=unions, SIZE=select["SIZE"], BLOCK=select["BLOCK"])
            # Gated, as a screen launches it, is ungated and one load more.
            gated = topk | dict(GATED=True)
            yield Launch(encode_topk._keep_first_of_tiles, "encode_topk", shape, gated, encoder, **how)
            yield Launch(encode_topk._run_full_tiles_again, "encode_topk", shape, again, encoder, **how)
            yield Launch(encode_threshold._keep_active_of_tiles, "encode_threshold", shape, constants, encoder, **how)
            yield Launch(encode_threshold._run_full_tiles_again, "encode_threshold", shape, constants, encoder, **how)
            given = encoder | {"floor": "fp32"}
            yield Launch(count_above._given_features, "count_above", shape, topk, given, **how)
            yield Launch(count_above._count_ahead, "count_above", shape, topk, encoder, **how)
    yield from _screens(architecture)
    for features, count in ((16_384, 64), (65_536, 64), (131_072, 256), (1_048_576, 128)):
        n_tiles = triton.cdiv(features, FEATURES)
        meta = encode_topk.select_meta(n_tiles * encode_topk.default_slots(features, count), n_tiles, count)
        warps = meta.pop("num_warps")
        shape = f"d_sae {features}, k {count}"
        yield Launch(encode_topk._select, "encode_topk", shape, meta | dict(GATED=True), {}, warps=warps, stages=3)
    lists = dict(SLOTS=triton.next_power_of_2(slots), TILES=encode_threshold.TILES)
    yield Launch(encode_threshold._gather_lists, "encode_threshold", f"d_sae {d_sae}", lists, {}, warps=4, stages=3)
    flags = dict(HAS_BIAS=True, HAS_SCALE=True, HAS_BASE=True)
    columns = flags | dict(ROWS=decode_sparse.ROWS, COLUMNS=decode_sparse.COLUMNS)
    for name in TYPES.values():
        decoder = {"decoder_ptr": f"*{name}", "base_ptr": f"*{name}", "out_ptr": f"*{name}", "values_ptr": "*fp32"}
        warps = 4 if backend == "cuda" else 2
        yield Launch(decode_sparse._decode, "decode_sparse", name, columns, decoder, warps=warps, stages=3)


def _screens(architecture: Architecture) -> Iterator[Launch]:
    """encode_topk_screened, which count_above_screened launches too, where it is worth it: 1 and 64 tokens."""
    op, d_sae, k = "encode_topk_screened", 131_072, 64
    capacity, n_tiles = screened.default_capacity(k), triton.cdiv(d_sae, FEATURES)
    slots = min(slots_per_tile(d_sae, capacity), screened.MAX_KEPT // n_tiles)
    # The smallest of NVIDIA's that converts it, see `steer_kernels.triton_target.converts_e4m3`.
    converts = architecture.target.backend == "cuda" and architecture.target.arch >= 89
    copies = {"int8": "*i8"} | ({"e4m3": "*fp8e4nv"} if converts else {})
    for tokens in (1, 64):
        for dtype, name in TYPES.items():
            tile = tile_shape(tokens, dtype, architecture.target.backend)
            shape = f"{tokens} tokens, {name}"
            constants = dict(HAS_SCALE=True, ABSOLUTE=True, TOKENS=tile.tokens, FEATURES=FEATURES, INNER=tile.inner)
            # Gated, as count_above_screened launches it, is ungated and one load more.
            gated = constants | dict(GATED=True)
            warps = screened.screen_shape(tokens, dtype, architecture.target.backend).warps
            for copy, pointer in copies.items():
                types = {"x_ptr": f"*{name}", "weights_ptr": pointer}
                screen = f"{shape}, {copy}"
                yield Launch(screened._screen_tiles, op, screen, gated, types, warps=warps, stages=tile.stages)
            types = {"x_ptr": f"*{name}", "encoder_ptr": f"*{name}"}
            yield Launch(screened._rescore, op, shape, constants, types, warps=tile.warps, stages=tile.stages)
    for meta, kernel in (
        (screened.choose_meta(n_tiles * slots, n_tiles), screened._choose_candidates),
        (screened.certify_meta(capacity, k) | dict(TOKENS=64), screened._certify),
    ):
        warps = meta.pop("num_warps")
        yield Launch(kernel, op, f"d_sae {d_sae}, k {k}", meta | dict(GATED=True), {}, warps=warps, stages=3)
    given = dict(GIVEN=MAX_GIVEN, PLACES=count_screened.PLACES)
    yield Launch(count_screened._place_given, "count_above_screened", f"k {k}", given, {}, warps=4, stages=3)


POINTERS = {
    "group_ptr": "*i32",
    "first_write_ptr": "*i32",
    "first_read_ptr": "*i32",
    "table_ptr": "*i32",
    "edited_ptr": "*i32",
    "asked_ptr": "*i32",
    "kept_ptr": "*i64",
    "first_ptr": "*i64",
    "features_ptr": "*i64",
    "given_ptr": "*i64",
    "full_ptr": "*i32",
    "n_full_ptr": "*i32",
    "n_active_ptr": "*i32",
    "kept_features_ptr": "*i32",
    "counts_ptr": "*i32",
    "ahead_ptr": "*i32",
    "keys_ptr": "*i32",
    "to_rank_ptr": "*i32",
    "to_rank_tiles_ptr": "*i32",
    "asked_tiles_ptr": "*i32",
    "candidates_ptr": "*i64",
    "n_candidates_ptr": "*i32",
    "rest_ptr": "*i32",
    "wanted_ptr": "*i32",
    "wanted_tiles_ptr": "*i32",
}
ALIGNED = ("d_in", "x_stride", "encoder_stride", "decoder_stride", "base_stride", "d_out")
"""Sizes that are multiples of 16 in every SAE that is served, as Triton's launcher finds out for itself."""


def compile_for(launch: Launch, architecture: Architecture) -> Compiled:
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, name in enumerate(launch.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "encoder_inner_stride":
            signature[name], constants[name] = "constexpr", 1
        else:
            other = "*fp32" if name.endswith("_ptr") else "i32"
            signature[name] = launch.types.get(name, POINTERS.get(name, other))
            if name.endswith("_ptr") or name in ALIGNED:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    compiled = triton.compile(source, target=architecture.target, options=options)
    if architecture.target.backend == "cuda":
        registers, spilled = _cuda_usage(compiled.asm["ptx"], architecture.target.arch)
        instructions = re.findall(r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync)", compiled.asm["ptx"])
    else:
        registers, spilled = _amd_usage(compiled.asm["amdgcn"])
        instructions = re.findall(r"\b(v_mfma)", compiled.asm["amdgcn"])
    return Compiled(
        op=launch.op,
        kernel=launch.kernel.__name__,
        shape=launch.shape,
        architecture=architecture.name,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        shared_limit=architecture.shared_limit,
        warps=launch.warps,
        matrix_instruction=instructions[0] if instructions else "",
    )


def _cuda_usage(ptx: str, arch: int) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads), both of one thread, as the ptxas that Triton calls reports them."""
    name = re.findall(r"\.target (\w+)", ptx)[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", source, "-o", source.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)[-1]
    return int(re.findall(r"Used (\d+) registers", report)[-1]), sum(int(part) for part in spilled)


def _amd_usage(assembly: str) -> tuple[int, int]:
    def last(pattern: str) -> int:
        return int(re.findall(pattern, assembly)[-1])

    spilled = last(r"\.vgpr_spill_count:\s+(\d+)") + last(r"\.sgpr_spill_count:\s+(\d+)")
    return last(r"\.vgpr_count:\s+(\d+)"), 4 * spilled


def table(rows: list[Compiled]) -> str:
    lines = [
        "# The Triton kernels, compiled ahead of time",
        "",
        f"By `python -m benchmarks.kernels.aot`, Triton {triton.__version__}, with no GPU: registers and spilled bytes",
        "are the compilers' own figures, per thread; shared memory is KiB a program, of what the architecture allows.",
        "Nothing here says how fast anything is.",
        "",
        "| op | kernel | shape | target | warps | registers | spilled | shared | matrix instruction |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shared = f"{row.shared_bytes / 1024:.1f} of {row.shared_limit >> 10}"
        cells = (row.op, f"`{row.kernel.lstrip('_')}`", row.shape, row.architecture, row.warps, row.registers)
        more = (row.spilled_bytes, shared, row.matrix_instruction)
        lines.append("| " + " | ".join(str(cell) for cell in cells + more) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    work = [(launch, arch) for arch in ARCHITECTURES for launch in launches(arch)]
    rows = [compile_for(launch, arch) for launch, arch in track(work, "Compiling", console=Console(stderr=True))]
    rows.sort(key=lambda row: (row.op, row.kernel))
    RESULTS.mkdir(exist_ok=True)
    record = {"triton": triton.__version__, "kernels": [asdict(row) for row in rows]}
    (RESULTS / "kernels_aot.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "kernels_aot.md").write_text(table(rows))


if __name__ == "__main__":
    main()
