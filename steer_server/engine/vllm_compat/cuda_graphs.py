"""Seam: CUDA graphs. Where a request is steered the op runs between them; else a forward is replayed whole.

A FULL graph holds a whole forward as it was when vLLM captured it, with no site armed: what an unsteered step needs, at
the speed of vanilla vLLM. What the op does in a steered step follows the step table, so such a step is run as vLLM runs
a batch with a prefill in it, in PIECEWISE graphs that end where the op begins. Should a steered step be replayed whole
nevertheless, its sites have not run and the worker reports them as missing.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from steer_server.engine.vllm_compat.patching import when_imported, wrap

if TYPE_CHECKING:
    from steer_server.engine.vllm_compat.armed_model import ArmedModel

OP_NAME = "steer_kernels::apply_edits"


def install() -> None:
    when_imported("vllm.v1.cudagraph_dispatcher", _install_dispatcher)
    when_imported("vllm.v1.worker.gpu.dp_utils", _install_agreement)


def _install_dispatcher(module: ModuleType) -> None:
    wrap(module.CudagraphDispatcher, "dispatch", ("num_tokens", "invalid_modes"), _dispatch_v1)


def _install_agreement(module: ModuleType) -> None:
    takes = ("cudagraph_manager", "num_reqs", "num_tokens", "uniform_token_count", "max_query_len")
    wrap(module, "dispatch_cg_and_sync_dp", takes, _dispatch_v2)


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
    """From now on `chooser`, what picks a runner's graphs, asks whether `armed` has a request to steer."""
    chooser.armed = armed


def _has_work(chooser: Any) -> bool:
    # A drafting model decodes with a chooser of its own, which nothing arms.
    armed: ArmedModel | None = getattr(chooser, "armed", None)
    return armed is not None and armed.steering.has_work


def _dispatch_v1(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.config import CUDAGraphMode

    if _has_work(self):
        kwargs["invalid_modes"] = {CUDAGraphMode.FULL, *(kwargs.get("invalid_modes") or ())}
    return original(self, *args, **kwargs)


def _dispatch_v2(
    original: Any,
    cudagraph_manager: Any,
    num_reqs: int,
    num_tokens: int,
    uniform_token_count: int | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if _has_work(cudagraph_manager):
        # As of requests of different lengths, which no whole graph is for. Data-parallel ranks agree on what they have
        # behind this, and pad alike.
        uniform_token_count = kwargs["max_query_len"] = None
    return original(cudagraph_manager, num_reqs, num_tokens, uniform_token_count, *args, **kwargs)
