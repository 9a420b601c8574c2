"""What Triton compiles for in this process."""

from __future__ import annotations

from functools import cache

import triton


@cache
def triton_backend() -> str:
    """The backend, "cuda" or "hip"; "cuda" under the interpreter, which has no device."""
    return "cuda" if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().backend


@cache
def converts_e4m3() -> bool:
    """Whether kernels of this process can read float8_e4m3fn: NVIDIA's GPUs from Ada on, and the interpreter."""
    if triton.knobs.runtime.interpret:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 89
