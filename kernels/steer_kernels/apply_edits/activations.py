"""What becomes of a pre-activation in the torch path: whether its feature survives, and what a row writes for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from steer_kernels.apply_edits.edits import FloatArray, IntArray, SiteEdits, TopKEncoder, group_probability
from steer_kernels.blocks import pre_activations

MEMBERSHIP_CHUNK = 256
"""Tokens whose [tokens, features] pre-activations a membership test holds at once."""


@dataclass(frozen=True)
class Response:
    """g(f) - f for some values; None where no row of the group needs the step. condition: whether they are conditions
    instead, all of them."""

    threshold: torch.Tensor | None
    scale: torch.Tensor
    gain: torch.Tensor
    """scale - 1."""
    shift: torch.Tensor
    low: torch.Tensor | None
    high: torch.Tensor | None
    condition: bool
    zero: torch.Tensor
    """0, made once: torch.where makes a tensor of a number in each call."""

    @staticmethod
    def of(edits: SiteEdits, device: torch.device) -> Response:
        def column(values: FloatArray, neutral: float) -> torch.Tensor | None:
            return None if bool((values == neutral).all()) else torch.from_numpy(values).to(device)

        return Response(
            threshold=column(edits.threshold, -np.inf),
            scale=torch.from_numpy(edits.scale).to(device),
            gain=torch.from_numpy(edits.scale - np.float32(1)).to(device),
            shift=torch.from_numpy(edits.shift).to(device),
            low=column(edits.low, -np.inf),
            high=column(edits.high, np.inf),
            condition=bool(edits.is_condition.all()),
            zero=torch.zeros((), device=device),
        )

    def activation(self, pre: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """f of pre-activations; index: those rows of the group that they are of, None for all."""
        if self.threshold is None:
            return pre
        threshold = self.threshold if index is None else self.threshold[index]
        return torch.where(pre > threshold, pre, self.zero)

    def may_be_on(self, pre: torch.Tensor) -> torch.Tensor:
        """Where f is not zero, whatever the other features are."""
        return torch.ones_like(pre, dtype=torch.bool) if self.threshold is None else pre > self.threshold

    def coefficient(self, f: torch.Tensor, s: torch.Tensor | None) -> torch.Tensor:
        """s * (g(f) - f), s None for 1; of conditions, which nothing scales, 1 where they do not hold."""
        if self.condition:
            above = torch.ones_like(f, dtype=torch.bool) if self.low is None else f > self.low
            return (above != (self.scale >= 0)).float()
        coefficient = self._change(f)
        return coefficient if s is None else coefficient.mul_(s)

    def _change(self, f: torch.Tensor) -> torch.Tensor:
        """g(f) - f."""
        if self.low is None and self.high is None:
            return torch.addcmul(self.shift, f, self.gain)
        g = torch.addcmul(self.shift, f, self.scale)
        if self.low is not None:
            g = torch.maximum(g, self.low)
        if self.high is not None:
            g = torch.minimum(g, self.high)
        return g.sub_(f)


@dataclass(frozen=True)
class Selector:
    """What decides which features of one group of an encoder survive.

    encoder: [group size, d_model], b_enc: [group size]. feature [n]: places in the group of the features that are asked
    for. group: its number.
    """

    encoder: torch.Tensor
    b_enc: torch.Tensor
    k: int
    absolute: bool
    router: tuple[torch.Tensor, torch.Tensor] | None
    group: int
    feature: torch.Tensor

    @staticmethod
    def of(encoder: TopKEncoder, features: IntArray) -> Selector:
        """features: of one group."""
        size = encoder.group_size
        group = int(features[0]) // size
        members = slice(group * size, (group + 1) * size)
        return Selector(
            encoder=encoder.W_enc.T[members],
            b_enc=encoder.b_enc[members],
            k=encoder.k,
            absolute=encoder.absolute,
            router=encoder.router,
            group=group,
            feature=torch.from_numpy(features - group * size).to(encoder.b_enc.device),
        )

    def pre_acts(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            return pre_activations(x, self.encoder, self.b_enc, None)
        return torch.nn.functional.linear(x, self.encoder, self.b_enc)

    def probability(self, x: torch.Tensor) -> torch.Tensor | None:
        """[tokens]: that of the group, 0 where the router chooses another; None without a router."""
        return None if self.router is None else group_probability(x, self.router, self.group)
