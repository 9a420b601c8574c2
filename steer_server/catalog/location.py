"""Where an SAE is, as an operator types it: a path, a place on the hub, or a name of a SAELens release."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlencode

from sae_models import LoadOptions, SAEFormatError
from steer_server.catalog.catalog import CatalogError
from steer_server.catalog.hub import SCHEME, HubLocation, local_copy
from steer_server.catalog.saelens_releases import released_sae

_RELEASE = re.compile(r"(?P<release>[A-Za-z0-9][A-Za-z0-9._-]*):(?P<sae_id>[A-Za-z0-9_][^@:]*)(?:@(?P<revision>.+))?")


def resolve_location(location: str, pickles: bool = False) -> str:
    """The absolute local path, with its `?OPTIONS`, of an SAE.

    location: `PATH`, `hf://OWNER/REPO[/PATH][@REVISION]` or `RELEASE:SAE_ID[@REVISION]`, each with `?OPTIONS` behind it
    where they are needed. Links in a path are kept: those of the hub's cache lead to files without a name.
    pickles: whether a pickled file on the hub may be what is wanted. Raises CatalogError.
    """
    name, _, query = location.partition("?")
    try:
        options = LoadOptions.parse(query).given()
    except SAEFormatError as error:
        raise CatalogError(f"{name}: {error}") from None
    release = _RELEASE.fullmatch(name)
    if name.startswith(SCHEME):
        path = local_copy(HubLocation.parse(name), pickles)
    elif release is not None and not Path(name).exists():
        found = released_sae(release["release"], release["sae_id"])
        revision = f"@{release['revision']}" if release["revision"] else ""
        path = local_copy(HubLocation.parse(f"{SCHEME}{found.repo}/{found.path}{revision}"), pickles)
        if found.scaling_factor is not None:
            options = _norm(path, found.scaling_factor) | options
    else:
        path = Path(name).expanduser().absolute()
    return f"{path}?{urlencode(options, safe=',/')}" if options else str(path)


def _norm(folder: Path, scaling_factor: float) -> dict[str, str | float | int]:
    """Option `norm` for a SAELens checkpoint that was trained on scaled activations and leaves their scale out."""
    try:
        config = json.loads((folder / "cfg.json").read_text())
        if config.get("normalize_activations") in (True, "expected_average_only_in"):
            return {"norm": int(config["d_in"]) ** 0.5 / scaling_factor}
    except (OSError, ValueError, KeyError, AttributeError):
        # Not SAELens' own layout, or not a sound one, which its loader will say.
        pass
    return {}
