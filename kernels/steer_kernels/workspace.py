"""Scratch memory of the kernels: one buffer a device and stream, which all of them share.

Kernels on a stream run one after the other and none keeps anything there from call to call, so they need one buffer, as
large as the largest of them wants. It is never freed or moved: a CUDA graph that was captured with it stays valid.
"""

from __future__ import annotations

import math

import torch

ALIGNMENT = 256

_buffers: dict[tuple[torch.device, int], list[torch.Tensor]] = {}


def carve(device: torch.device, *pieces: tuple[tuple[int, ...], torch.dtype]) -> tuple[torch.Tensor, ...]:
    """Uninitialised tensors of these shapes and dtypes, valid until the next call on the same stream.

    Raises RuntimeError where the buffer would have to grow while a CUDA graph is captured: what is allocated then
    belongs to the graph, so `reserve` first, or run the same shapes once.
    """
    ends, end = [], 0
    for shape, dtype in pieces:
        end = math.ceil(end / ALIGNMENT) * ALIGNMENT + math.prod(shape) * dtype.itemsize
        ends.append(end)
    buffer = _at_least(device, end)
    return tuple(
        buffer[end - math.prod(shape) * dtype.itemsize : end].view(dtype).view(shape)
        for (shape, dtype), end in zip(pieces, ends, strict=True)
    )


def reserve(device: torch.device, n_bytes: int) -> None:
    """Make the current stream's buffer hold n_bytes from now on."""
    _at_least(device, n_bytes)


def held_bytes(device: torch.device) -> int:
    """Bytes of all buffers on the device."""
    return sum(b.numel() for (d, _), buffers in _buffers.items() for b in buffers if d == device)


def _at_least(device: torch.device, n_bytes: int) -> torch.Tensor:
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    buffers = _buffers.setdefault((device, stream), [])
    if not buffers or buffers[-1].numel() < n_bytes:
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the kernels' workspace would have to grow to {n_bytes} bytes during the capture of a CUDA graph: "
                "call steer_kernels.workspace.reserve before"
            )
        # Doubling bounds what is held by smaller, older buffers, which captured graphs may still use.
        size = max(n_bytes, 2 * buffers[-1].numel() if buffers else 0)
        buffers.append(torch.empty(size, dtype=torch.uint8, device=device))
    return buffers[-1]
