"""Which features of a token survive where they are compared with each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """The k first of each of `groups` equal, consecutive groups of features; of equals, the lower index.

    absolute: ranked by magnitude, the sign kept (AbsTopK); else by value.
    routed: only the group that a router ranks first survives, times the router's probability for it (Switch).
    """

    k: int
    groups: int = 1
    absolute: bool = False
    routed: bool = False

    def keep(self, pre_acts: torch.Tensor) -> torch.Tensor:
        """Which of pre_acts [n, d_sae] are kept, bool, by rank alone."""
        n, d_sae = pre_acts.shape
        ranked = (pre_acts.abs() if self.absolute else pre_acts).reshape(n, self.groups, d_sae // self.groups)
        smallest = ranked.topk(self.k, dim=-1).values[..., -1:]
        kept = ranked >= smallest
        if bool((kept.sum(-1) == self.k).all()):
            return kept.reshape(n, d_sae)
        above, tied = ranked > smallest, ranked == smallest
        room = self.k - above.sum(-1, keepdim=True)
        return (above | (tied & (tied.cumsum(-1) <= room))).reshape(n, d_sae)

    def route(self, scores: torch.Tensor) -> torch.Tensor:
        """What activations [n, d_sae] are multiplied by, [n, groups]: the first group's probability, else 0.

        scores: [n, groups], the router's, before its softmax.
        """
        best = scores.argmax(-1, keepdim=True)
        return torch.zeros_like(scores).scatter(-1, best, scores.softmax(-1).gather(-1, best))
