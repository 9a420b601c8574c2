"""An SAE by what a user types on a command line."""

from __future__ import annotations

import os

from sae_models import SAE, SAEFormatError, load
from sae_models.pretrained import pretrained_saes
from steer_server.catalog.catalog import CatalogError


def find_sae(name_or_location: str) -> SAE:
    """A shipped SAE by name, or the one at `PATH[?OPTIONS]`. Raises CatalogError that lists the shipped ones."""
    shipped = {sae.name: sae for sae in pretrained_saes()}
    if name_or_location in shipped:
        return shipped[name_or_location]
    try:
        return load(os.path.expanduser(name_or_location))  # noqa: PTH111 (a Path would take the options apart)
    except SAEFormatError as error:
        names = ", ".join(shipped)
        raise CatalogError(
            f"SAE {name_or_location!r} is not one that ships ({names}), and as a path: {error}"
        ) from None
