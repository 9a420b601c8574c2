"""What a plan adds to vLLM's prefix-cache keys.

vLLM hashes a sequence block by block, each hash covering its parent's. A block's key-value entries depend on the edits
that act on its own tokens and, through the parent, on those before. So each block is keyed by the edits that touch it
and by where in the block they do: blocks that no edit touches keep the plain hash and are shared with everyone.
"""

from __future__ import annotations

import hashlib

import msgspec

from steer_server.plan.plan import Plan, Target


class BlockKeys:
    """Keys for the blocks of one sequence with this plan, whose prompt has `prompt_len` tokens."""

    def __init__(self, plan: Plan, prompt_len: int) -> None:
        by_target: dict[Target, list[bytes]] = {}
        for edit in plan.edits:
            content = (edit.site, edit.read_site, edit.norm, edit.read, edit.write, edit.response)
            by_target.setdefault(edit.target, []).append(msgspec.msgpack.encode(content))
        self._intervals = [
            (
                *target.interval(prompt_len),
                hashlib.sha256(msgspec.msgpack.encode((sorted(edits), plan.preserve_norm, plan.when))),
            )
            for target, edits in by_target.items()
        ]

    def key(self, start: int, end: int) -> bytes | None:
        """The key of the block of positions [start, end), or None where no edit touches it."""
        touching = sorted(
            (digest.digest(), max(first, start) - start, min(last, end) - start)
            for first, last, digest in self._intervals
            if max(first, start) < min(last, end)
        )
        return hashlib.sha256(msgspec.msgpack.encode(touching)).digest() if touching else None
