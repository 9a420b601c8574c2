"""Seam: CUDA graphs. vLLM's own while nobody is steered; of whole forwards a second set, with each site's launch in it.

A FULL graph holds a whole forward as it was when vLLM captured it. vLLM's have no site armed: what an unsteered step
needs, at the speed of vanilla vLLM. The second set is captured after it, one for each of vLLM's, while every site
launches the kernel; what a launch does follows the step table in device memory. Their keys are twins of vLLM's: of a
class of their own, with the same values, so that whatever vLLM looks up in a key it finds.

A step that those graphs cannot hold (a stream is captured, too many edits, features ranked within groups) is run as
vLLM runs a batch with a prefill in it, in PIECEWISE graphs that end where the op begins.

Each graph of the second set is replayed to prove that every site's launch is in it, as the kernel counts. Where that
fails, or their capture does, steered steps run in PIECEWISE graphs, and a warning says so. In serving too, what a
replayed forward did is what the kernel counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from steer_server.engine.vllm_compat.patching import when_imported, wrap
from steer_server.engine.whole_forwards import Graphs

if TYPE_CHECKING:
    from steer_server.engine.vllm_compat.armed_model import ArmedModel
    from steer_server.engine.worker import WorkerSteering

OP_NAME = "steer_kernels::apply_edits"
CAPTURING = "Capturing CUDA graphs of steered forwards"

# Under "vllm", whose handlers print in the engine's processes.
logger = init_logger(f"vllm.{__name__}")


def install() -> None:
    when_imported("vllm.v1.cudagraph_dispatcher", _install_dispatcher)
    when_imported("vllm.v1.worker.gpu_model_runner", _install_v1_capture)
    when_imported("vllm.v1.worker.gpu.dp_utils", _install_agreement)
    when_imported("vllm.v1.worker.gpu.cudagraph_utils", _install_v2_capture)


def _install_dispatcher(module: ModuleType) -> None:
    wrap(module.CudagraphDispatcher, "dispatch", ("num_tokens", "invalid_modes"), _dispatch_v1)


def _install_v1_capture(module: ModuleType) -> None:
    runner = module.GPUModelRunner
    wrap(runner, "_warmup_and_capture", ("desc", "cudagraph_runtime_mode"), _warmup_and_capture_v1)
    wrap(runner, "capture_model", (), _capture_model_v1)


def _install_agreement(module: ModuleType) -> None:
    takes = ("cudagraph_manager", "num_reqs", "num_tokens", "uniform_token_count", "max_query_len")
    wrap(module, "dispatch_cg_and_sync_dp", takes, _dispatch_v2)


def _install_v2_capture(module: ModuleType) -> None:
    wrap(module.CudaGraphManager, "capture", ("create_forward_fn", "progress_bar_desc"), _capture_v2)
    wrap(module.ModelCudaGraphManager, "capture", ("model", "model_state"), _capture_model_v2)


def split_at_the_op(compilation: Any) -> None:
    """Make the op a point where vLLM splits the graph, and its CUDA graphs the pieces between, beside whole ones.

    vLLM treats attention the same way. On CPU there are no CUDA graphs and nothing is changed.
    """
    from vllm.config import CompilationMode, CUDAGraphMode

    if compilation.mode != CompilationMode.VLLM_COMPILE or compilation.cudagraph_mode == CUDAGraphMode.NONE:
        return
    if compilation.cudagraph_mode.has_full_cudagraphs():
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    splits = list(compilation.splitting_ops or [])
    splits += [op for op in compilation._attention_ops if op not in splits]
    compilation.splitting_ops = [*splits, OP_NAME] if OP_NAME not in splits else splits


def choose_graphs_for(armed: ArmedModel | None, chooser: Any) -> None:
    """From now on `chooser`, what picks a runner's graphs, asks what `armed` has to do in the step at hand."""
    chooser.armed = armed


def steered(key: Any) -> Any:
    """The twin of a key of vLLM's graphs, under which the graph with every site's launch is kept."""
    key_class: Any = type(key)
    return _steered_class(key_class)(**{field.name: getattr(key, field.name) for field in fields(key)})


@functools.cache
def _steered_class(key_class: Any) -> Any:
    # Data classes are equal only to those of the same class.
    return type(f"Steered{key_class.__name__}", (key_class,), {"is_steered": True})


def _forget_steered(graphs: dict[Any, Any]) -> None:
    """Give back the memory of graphs that will not be replayed."""
    for key in [key for key in graphs if getattr(key, "is_steered", False)]:
        del graphs[key]


def _wanted(chooser: Any) -> Graphs:
    # A drafting model decodes with a chooser of its own, which nothing arms.
    armed: ArmedModel | None = getattr(chooser, "armed", None)
    return Graphs.VANILLA if armed is None else armed.steering.graphs


def _may_capture(steering: WorkerSteering, vllm_config: Any) -> bool:
    # A pipeline stage tells the next one what it missed when it hands on the stream, which waits for no count.
    staged = vllm_config.parallel_config.pipeline_parallel_size > 1
    return steering.table is not None and not staged and not steering.graphs_failed


@torch.inference_mode()
def _capture_every_launch(
    steering: WorkerSteering, capture: Callable[[], object], graphs: dict[Any, Any], vllm_config: Any
) -> bool:
    """Whether `capture` has added graphs of steered forwards to `graphs`. Of an engine of several ranks, raises what it
    raises."""
    steering.in_graphs = False
    try:
        with steering.every_launch():
            capture()
    except Exception as error:
        parallel = vllm_config.parallel_config
        if parallel.tensor_parallel_size > 1 or parallel.data_parallel_size > 1:
            # The other ranks are in the middle of it, and wait for this one.
            raise
        logger.warning("Steering: no CUDA graphs of steered forwards (%s: %s)", type(error).__name__, error)
        steering.graphs_failed = True
        _forget_steered(graphs)
        return False
    return True


@torch.inference_mode()
def _prove(
    steering: WorkerSteering, replays: list[tuple[Any, Callable[[], object]]], graphs: dict[Any, Any], vllm_config: Any
) -> None:
    """Let steered steps be replayed whole, if every one of the graphs (key, what replays it) edits at every site, on
    every tensor-parallel rank."""
    wrong: list[str] = []
    # All of them, whatever the first ones did: ranks replay together.
    for key, replay in replays:
        missing = steering.prove(replay)
        if missing:
            wrong.append(f"{key} at {', '.join(missing)}")
    steering.in_graphs = bool(replays) and _on_all_ranks(not wrong, vllm_config)
    if steering.in_graphs:
        logger.info(
            "Steering: %d CUDA graphs of whole steered forwards, each proven to edit at every site", len(replays)
        )
    elif replays:
        logger.warning(
            "Steering: steered forwards run in piecewise CUDA graphs; whole ones were captured and do not edit: %s",
            "; ".join(wrong) or "those of another rank",
        )
        _forget_steered(graphs)


def _on_all_ranks(mine: bool, vllm_config: Any) -> bool:
    """Whether it is so on this and every other rank that computes parts of the same forwards."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return mine
    from vllm.distributed.parallel_state import get_tp_group

    agreed = torch.tensor([int(mine)])
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    return bool(agreed.item())


def _dispatch_v1(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.config import CUDAGraphMode

    wanted = _wanted(self)
    if wanted is Graphs.PIECES:
        kwargs["invalid_modes"] = {CUDAGraphMode.FULL, *(kwargs.get("invalid_modes") or ())}
    mode, key = original(self, *args, **kwargs)
    if wanted is Graphs.STEERED:
        self.armed.steering.replays_whole = mode == CUDAGraphMode.FULL
        key = steered(key) if mode == CUDAGraphMode.FULL else key
    return mode, key


def _warmup_and_capture_v1(
    original: Any, self: Any, desc: Any, cudagraph_runtime_mode: Any, *args: Any, **kwargs: Any
) -> None:
    from vllm.config import CUDAGraphMode

    def capture() -> None:
        original(self, desc, cudagraph_runtime_mode, *args, **kwargs)

    capture()
    # Here, so that the memory that vLLM measures for its graphs is that of both.
    if cudagraph_runtime_mode == CUDAGraphMode.FULL and _captures_v1(self):
        _capture_every_launch(self.armed.steering, capture, _graphs_v1(self), self.vllm_config)


def _captures_v1(runner: Any) -> bool:
    armed: ArmedModel | None = runner.armed
    return armed is not None and _may_capture(armed.steering, runner.vllm_config)


def _graphs_v1(runner: Any) -> dict[Any, Any]:
    # The model is wrapped by what captures it.
    graphs: dict[Any, Any] = runner.model.concrete_cudagraph_entries
    return graphs


def _capture_model_v1(original: Any, self: Any) -> Any:
    from vllm.config import CUDAGraphMode

    size = original(self)
    whole = dict(self.cudagraph_dispatcher.get_capture_descs()).get(CUDAGraphMode.FULL, [])
    if whole and _captures_v1(self):
        replays = [(key, functools.partial(_dummy_forward_v1, self, key)) for key in whole]
        _prove(self.armed.steering, replays, _graphs_v1(self), self.vllm_config)
        self.maybe_remove_all_loras(self.lora_config)
    return size


def _dummy_forward_v1(runner: Any, key: Any) -> None:
    from vllm.config import CUDAGraphMode

    runner._dummy_run(
        key.num_tokens,
        cudagraph_runtime_mode=CUDAGraphMode.FULL,
        uniform_decode=key.uniform,
        skip_eplb=True,
        remove_lora=False,
        num_active_loras=key.num_active_loras,
    )


def _dispatch_v2(
    original: Any,
    cudagraph_manager: Any,
    num_reqs: int,
    num_tokens: int,
    uniform_token_count: int | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from vllm.config import CUDAGraphMode

    wanted = _wanted(cudagraph_manager)
    if wanted is Graphs.PIECES:
        # As of requests of different lengths, which no whole graph is for. Data-parallel ranks agree on what they have
        # behind this, and pad alike.
        uniform_token_count = kwargs["max_query_len"] = None
    key, agreement = original(cudagraph_manager, num_reqs, num_tokens, uniform_token_count, *args, **kwargs)
    # A drafting model, which reads its prompt in the batch of the steered one, has no sites.
    if wanted is Graphs.STEERED and getattr(cudagraph_manager, "has_sites", False):
        whole = key.cg_mode == CUDAGraphMode.FULL
        cudagraph_manager.armed.steering.replays_whole = whole
        key = steered(key) if whole else key
    return key, agreement


def _capture_model_v2(original: Any, self: Any, model: Any, model_state: Any, *args: Any, **kwargs: Any) -> None:
    self.has_sites = True
    choose_graphs_for(getattr(model_state, "armed", None), self)
    original(self, model, model_state, *args, **kwargs)


def _capture_v2(original: Any, self: Any, create_forward_fn: Any, *args: Any, **kwargs: Any) -> None:
    from vllm.config import CUDAGraphMode

    original(self, create_forward_fn, *args, **kwargs)
    armed: ArmedModel | None = getattr(self, "armed", None)
    whole = self._capture_descs.get(CUDAGraphMode.FULL, [])
    if not getattr(self, "has_sites", False) or armed is None or not whole:
        return
    if not _may_capture(armed.steering, self.vllm_config):
        return
    twins = [steered(key) for key in whole]
    vanilla, samples = self._capture_descs, self._capture_mem_samples
    profiling = samples is not None
    self._capture_descs, self._capture_mem_samples = {CUDAGraphMode.FULL: twins}, [] if profiling else None
    try:
        captured = _capture_every_launch(
            armed.steering,
            lambda: original(self, create_forward_fn, progress_bar_desc=CAPTURING),
            self.graphs,
            self.vllm_config,
        )
        if captured and profiling:
            # What one graph of each set takes, together: vLLM multiplies it by the number of its own.
            samples[:] = [one + other for one, other in zip(samples, self._capture_mem_samples, strict=False)]
    finally:
        self._capture_descs, self._capture_mem_samples = vanilla, samples
    if captured and not profiling:
        replays = [(key, functools.partial(_dummy_forward_v2, self, create_forward_fn, key)) for key in twins]
        _prove(armed.steering, replays, self.graphs, self.vllm_config)


def _dummy_forward_v2(manager: Any, create_forward_fn: Any, key: Any) -> None:
    # The inputs of that graph, as at capture.
    create_forward_fn(key, warmup=False)
    manager.run_fullgraph(key)
