"""An SAE by what a user types on a command line."""

from __future__ import annotations

from sae_models import SAE, SAEFormatError, load
from sae_models.pretrained import pretrained_saes
from steer_server.catalog.catalog import CatalogError
from steer_server.catalog.location import resolve_location


def find_sae(name: str) -> SAE:
    """A shipped SAE by name, or the one at a location, see `resolve_location`. Raises CatalogError."""
    shipped = {sae.name: sae for sae in pretrained_saes()}
    if name in shipped:
        return shipped[name]
    try:
        return load(resolve_location(name))
    except (SAEFormatError, CatalogError) as error:
        raise CatalogError(f"SAE {name!r} is not one that ships ({', '.join(shipped)}): {error}") from None
