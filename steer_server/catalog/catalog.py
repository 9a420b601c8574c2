"""The SAEs that a server knows by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sae_models import SAE, HookPoint, SAEFormatError, load
from sae_models.hook_points import ARMABLE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


class CatalogError(ValueError):
    """A catalog that the operator asked for and that cannot be had."""


@dataclass(frozen=True)
class Catalog:
    """saes: SAE by the name that requests use."""

    saes: Mapping[str, SAE]

    def by_hash(self) -> dict[str, SAE]:
        """SAE by SHA-256, as plans name them."""
        return {sae.sha256: sae for sae in self.saes.values()}


def open_catalog(locations: Iterable[tuple[str, str]], d_model: int, layers: Iterable[int]) -> Catalog:
    """Open the SAEs at `locations` (name, local path with `?OPTIONS`) and check that each fits the model.

    d_model: width of the residual stream. layers: the decoder layers that are armed, in which an SAE may be at any kind
    of place that an engine can arm. Raises CatalogError.
    """
    armed = frozenset(layers)
    saes: dict[str, SAE] = {}
    for name, location in locations:
        if NAME.fullmatch(name) is None or len(name) > 128:
            raise CatalogError(f"SAE name {name!r}: use letters, digits, '.', '_', '-' and '/', 128 characters at most")
        if name in saes:
            raise CatalogError(f"SAE name {name!r} is given twice")
        try:
            sae = load(location)
        except SAEFormatError as error:
            raise CatalogError(f"SAE {name!r}: {error}") from None
        for point in (*sae.hook_points, *sae.hook_points_out):
            if not point.armable:
                kinds = ", ".join(str(HookPoint(point.layer, kind)) for kind in ARMABLE if kind != "resid_pre")
                raise CatalogError(
                    f"SAE {name!r} acts at {point}, which cannot be armed; what can, of each layer: {kinds}; and "
                    f"{HookPoint(0, 'resid_pre')}"
                )
            if point.layer not in armed:
                raise CatalogError(f"SAE {name!r} acts at {point}, which is not armed; armed layers: {sorted(armed)}")
        for width in (sae.d_in, sae.d_out):
            if width != d_model:
                raise CatalogError(f"SAE {name!r} is for d_model={width}, the model has {d_model}")
        saes[name] = sae
    return Catalog(saes)
