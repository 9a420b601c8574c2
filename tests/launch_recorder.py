"""What stands for a CUDA graph where Triton interprets: the launches of a forward, run again on the same memory.

As in a CUDA graph, Python is not run again: whatever it decided, and every number that it passed, is what it was at
capture. Tensors are read and written where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
INSIDE = {"steer_kernels::apply_edits"}
"""Ops whose own launches are recorded; any other op is one launch."""


def storages(tensors: Any) -> set[int]:
    flat = torch.utils._pytree.tree_leaves(tensors)
    return {t.untyped_storage().data_ptr() for t in flat if isinstance(t, torch.Tensor)}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Callable[[], None]] = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func.name() in INSIDE:
            from steer_kernels.apply_edits import op

            with self:
                return op._apply_edits(*args, **kwargs)
        self.paused = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.paused = False
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} waits for the device, which a CUDA graph cannot")
        if func._schema.name.split("::")[1] in UNINITIALISED:
            return result
        made = [r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, torch.Tensor)]
        # A view is where it was; what is written in place is written again by itself.
        made_new = [not (storages(r) & storages([args, kwargs])) for r in made]
        if func._schema.is_mutable or any(made_new):

            def again() -> None:
                found = torch.utils._pytree.tree_leaves(func(*args, **kwargs))
                tensors = [r for r in found if isinstance(r, torch.Tensor)]
                for kept, new, is_new in zip(made, tensors, made_new, strict=True):
                    if is_new:
                        kept.copy_(new)

            self.launches.append(again)
        return result


class RecordedGraph:
    """Takes `torch.cuda.CUDAGraph`'s place."""

    def __init__(self) -> None:
        self._launches: list[Callable[[], None]] = []

    def replay(self) -> None:
        for launch in self._launches:
            launch()

    @contextmanager
    def capture(self) -> Iterator[None]:
        from triton.runtime.interpreter import InterpretedFunction

        recorder, run = _Recorder(), InterpretedFunction.run

        def recorded_run(kernel, *args, **kwargs):
            if recorder.paused:
                return run(kernel, *args, **kwargs)
            recorder.paused = True
            try:
                run(kernel, *args, **kwargs)
            finally:
                recorder.paused = False
            recorder.launches.append(lambda: run(kernel, *args, **kwargs))
            return None

        with patch.object(InterpretedFunction, "run", recorded_run), recorder:
            yield
        self._launches = recorder.launches


def captured(forward: Callable[[], object], device: str) -> Any:
    """A graph, with `replay()`, of what `forward` launches: CUDA's own on a GPU. It runs once before, as vLLM has it
    run, which compiles its kernels and makes their workspace."""
    if device != "cuda":
        forward()
        recorded = RecordedGraph()
        with recorded.capture():
            forward()
        return recorded
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        forward()
    return graph
