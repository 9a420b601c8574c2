"""The SAEs that ship with the project, each a folder in SAELens format with a card."""

from __future__ import annotations

from pathlib import Path

from sae_models.sae import SAE


def pretrained_saes() -> list[SAE]:
    """All SAEs that ship, in the order of their folders' names."""
    from sae_models import load

    return [load(path.parent) for path in sorted(Path(__file__).parent.glob("*/cfg.json"))]


def pretrained_for(model_name: str) -> list[SAE]:
    """The shipped SAEs that were trained on `model_name`, compared by its last path component, case ignored.

    A served model is named by a hub id or by a folder, so `HuggingFaceTB/SmolLM2-135M-Instruct` and
    `/models/SmolLM2-135M-Instruct` are the same model here.
    """

    def last(name: str) -> str:
        return name.rstrip("/").rpartition("/")[2].lower()

    return [sae for sae in pretrained_saes() if sae.model_name is not None and last(sae.model_name) == last(model_name)]
