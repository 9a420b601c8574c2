"""Which tokens a whole-SAE kernel is launched for, where that is known on the device only."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Wanted:
    """What a pass is for: not zero where a token, or a tile of tokens with such a one, is wanted; both int32.

    Other tokens are left as they are, and tiles without wanted ones read nothing of the encoder.
    """

    tokens: torch.Tensor
    tiles: torch.Tensor
