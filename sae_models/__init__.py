"""Sparse autoencoder checkpoints in, one canonical SAE out.

Knows files and equations; knows neither HTTP nor vLLM.
"""

from pathlib import Path

from sae_models.families import saelens
from sae_models.hook_points import HookPoint
from sae_models.sae import SAE, FeatureRows, SAEFormatError

__all__ = ["SAE", "FeatureRows", "HookPoint", "SAEFormatError", "load"]

FAMILIES = (saelens,)


def load(path: Path | str) -> SAE:
    """Open the checkpoint at `path`, a folder in the format of a supported family.

    Weights stay on disk until rows of them are asked for. Raises SAEFormatError when the folder is of no supported
    family, or is of one and does not hold together.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise SAEFormatError(f"{folder}: no such folder")
    for family in FAMILIES:
        if family.detect(folder):
            return family.load(folder)
    known = ", ".join(f"{family.NAME} ({family.FILES})" for family in FAMILIES)
    raise SAEFormatError(f"{folder}: not a checkpoint of a supported family; supported: {known}")
