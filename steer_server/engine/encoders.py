"""The whole encoders that a worker holds: of SAEs whose features survive by comparison with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sae_models import SAE
from steer_kernels.apply_edits import Ranking, TokenNorm, TopKEncoder

TOKEN_NORMS = {"none": TokenNorm.NONE, "layer_norm": TokenNorm.LAYER_NORM, "constant_norm": TokenNorm.CONSTANT_NORM}


@dataclass(frozen=True)
class Encoders:
    """held: in the order of their numbers. number: by an SAE's SHA-256.

    in_groups: the SAEs, by SHA-256, whose features are compared within groups, which need a pass each.
    rankings: what a request may need of the others, by the number of the site where it is read.
    """

    held: list[TopKEncoder]
    number: dict[str, int]
    in_groups: frozenset[str]
    rankings: dict[int, list[Ranking]]

    @staticmethod
    def at(sites: Sequence[str], saes: Mapping[str, SAE], device: torch.device) -> Encoders:
        """Those that read at `sites`, which alone need them. saes: by SHA-256."""
        held: list[TopKEncoder] = []
        number: dict[str, int] = {}
        rankings: dict[int, list[Ranking]] = {}
        for sha256, sae in saes.items():
            read_at = [i for i, site in enumerate(sites) if site in map(str, sae.hook_points)]
            if sae.selection is None or not read_at:
                continue
            number[sha256] = len(held)
            held.append(encoder_of(sae, device))
            if held[-1].groups == 1:
                for site in read_at:
                    rankings.setdefault(site, []).append(Ranking(number[sha256], 0, TOKEN_NORMS[sae.token_norm]))
        in_groups = frozenset(sha256 for sha256, i in number.items() if held[i].groups > 1)
        return Encoders(held, number, in_groups, rankings)

    @property
    def nbytes(self) -> int:
        return sum(encoder.nbytes for encoder in self.held)


def encoder_of(sae: SAE, device: torch.device) -> TopKEncoder:
    """The whole encoder of an SAE with a selection, on `device`."""
    selection = sae.selection
    if selection is None:
        raise ValueError(f"SAE {sae.name!r} selects nothing: each feature is decided by its own threshold")
    W_enc, b_enc = sae.encoder()
    router = None
    if selection.routed:
        W, b = sae.router()
        router = W.to(device), b.to(device)
    return TopKEncoder(
        W_enc=W_enc.to(device),
        b_enc=b_enc.to(device),
        k=selection.k,
        groups=selection.groups,
        absolute=selection.absolute,
        floor=float(sae.thresholds().min()),
        router=router,
    )
