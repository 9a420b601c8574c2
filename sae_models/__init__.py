"""Sparse autoencoder checkpoints in, one canonical SAE out.

Knows files and equations; knows neither HTTP nor vLLM.
"""

from __future__ import annotations

from pathlib import Path

from sae_models.checkpoint import PICKLES, Checkpoint, OpenPickle
from sae_models.errors import SAEFormatError
from sae_models.families import FAMILIES
from sae_models.hook_points import HookPoint
from sae_models.options import LoadOptions, split_location
from sae_models.sae import SAE, FeatureRows
from sae_models.selection import Selection

__all__ = ["SAE", "FeatureRows", "HookPoint", "LoadOptions", "SAEFormatError", "Selection", "load"]


def load(location: Path | str, options: LoadOptions | None = None, open_pickle: OpenPickle | None = None) -> SAE:
    """Open the checkpoint at `location`, a folder or a file of a supported family; a string may end in `?OPTIONS`.

    Weights stay on disk until rows of them are asked for. open_pickle: how tensors are read out of a pickle; without
    it, as in a server, pickles are refused. Raises SAEFormatError when the files are of no supported family, or are of
    one and do not hold together.
    """
    if isinstance(location, str):
        name, found = split_location(location)
        path, options = Path(name), found if options is None else options
    else:
        path = location
    if not path.exists():
        raise SAEFormatError(f"{path}: no such file or folder")
    checkpoint = Checkpoint(path, options or LoadOptions(), open_pickle)
    for family in FAMILIES:
        if family.detect(checkpoint):
            try:
                sae: SAE = family.load(checkpoint)
                checkpoint.refuse_unused_options()
            except SAEFormatError:
                checkpoint.discard()
                raise
            return sae
    if path.suffix in PICKLES and open_pickle is None:
        raise checkpoint.pickle_error(path)
    known = "; ".join(f"{family.NAME} ({family.LAYOUT})" for family in FAMILIES)
    raise SAEFormatError(f"{path}: not a checkpoint of a supported family; supported: {known}")
