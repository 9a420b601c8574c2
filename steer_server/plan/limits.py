"""What one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """max_edits: edit rows of one request, counted once per layer they act on; conditions count too.

    max_inline_bytes: inline vectors of one request as float32, times its number of choices (`n`): each choice carries
        them to the engine.
    conditions: whether requests may have any.
    """

    max_edits: int
    max_inline_bytes: int = 1 << 28
    conditions: bool = True
