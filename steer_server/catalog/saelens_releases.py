"""SAEs by the names of SAELens' releases, `RELEASE:SAE_ID`, as the table in the installed package has them.

The table is read where the package lies; importing `sae_lens` would bring its whole training stack along.
"""

from __future__ import annotations

import difflib
import importlib.resources
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from steer_server.catalog.catalog import CatalogError

PACKAGE, TABLE = "sae_lens", "pretrained_saes.yaml"
INSTALL_HINT = "pip install --no-deps sae-lens"


@dataclass(frozen=True)
class ReleasedSAE:
    """repo, path: where it is on the hub. scaling_factor: what its training multiplied activations by, if known."""

    repo: str
    path: str
    scaling_factor: float | None


def released_sae(release: str, sae_id: str) -> ReleasedSAE:
    """What the table says about an SAE. Raises CatalogError where the table or the name is missing."""
    table = _table()
    entry = table.get(release)
    if entry is None:
        raise CatalogError(f"SAELens has no release {release!r}{_similar(release, table)}")
    by_id = {str(sae["id"]): sae for sae in entry["saes"]}
    sae = by_id.get(sae_id)
    if sae is None:
        raise CatalogError(f"SAELens' release {release!r} has no SAE {sae_id!r}{_similar(sae_id, by_id)}")
    path = str(sae["path"])
    if entry.get("conversion_func") == "mntss_clt_layer_transcoder":
        # The table names a layer there, not a file.
        path = f"W_enc_{path}.safetensors"
    factor = sae.get("norm_scaling_factor")
    return ReleasedSAE(str(entry["repo_id"]), path, None if factor is None else float(factor))


@cache
def _table() -> dict[str, Any]:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise CatalogError(f"names of SAELens' releases are read from the package sae-lens: {INSTALL_HINT}")
    folder = importlib.resources.files(importlib.util.module_from_spec(spec))
    try:
        text = folder.joinpath(TABLE).read_text(encoding="utf-8")
        # libyaml reads its 40,000 lines in a second; the reader that is always there takes ten.
        table = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError) as error:
        raise CatalogError(f"the package sae-lens has no readable {TABLE}: {error}") from None
    return dict(table)


def _similar(name: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"; similar: {', '.join(close)}" if close else ""
