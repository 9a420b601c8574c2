"""An SAE by what a user types on a command line."""

from __future__ import annotations

from pathlib import Path

from sae_models import SAE, SAEFormatError, load
from sae_models.pretrained import pretrained_saes
from steer_server.catalog.catalog import CatalogError


def find_sae(name_or_folder: str) -> SAE:
    """A shipped SAE by name, or the one in a folder. Raises CatalogError that lists the shipped ones."""
    shipped = {sae.name: sae for sae in pretrained_saes()}
    if name_or_folder in shipped:
        return shipped[name_or_folder]
    try:
        return load(Path(name_or_folder).expanduser())
    except SAEFormatError as error:
        names = ", ".join(shipped)
        raise CatalogError(
            f"SAE {name_or_folder!r} is not one that ships ({names}), and as a folder: {error}"
        ) from None
