"""What Triton compiles for in this process."""

from __future__ import annotations

from functools import cache

import triton


@cache
def triton_backend() -> str:
    """The backend, "cuda" or "hip"; "cuda" under the interpreter, which has no device."""
    return "cuda" if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().backend
