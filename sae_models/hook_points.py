"""Named places in a model, in TransformerLens' spelling."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


@dataclass(frozen=True, order=True)
class HookPoint:
    """The residual stream after decoder layer `layer`, counted from 0."""

    layer: int

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_resid_post"

    @staticmethod
    def parse(name: str) -> HookPoint:
        """Read `blocks.L.hook_resid_post`, or `hook_resid_pre` of a layer after the first, the same place by another
        name. Raises ValueError for every other name."""
        match = _RESIDUAL.fullmatch(name)
        if match is None:
            raise ValueError(f"hook point {name!r} is not supported; supported: blocks.<layer>.hook_resid_post")
        layer = int(match[1]) - (match[2] == "pre")
        if layer < 0:
            raise ValueError(f"hook point {name!r} lies before the first decoder layer, which is not supported")
        return HookPoint(layer)
