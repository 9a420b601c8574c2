"""What SAELens answers for a file in a layout of its table of loaders, in place of a download."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders


def saelens_answer(
    loader: Callable[..., Any], repo_id: str, file: Path, d_in: int, d_sae: int, x: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, notes) for `write_expected`. d_in, d_sae: in place of those that the loader knows of the release."""

    def sized(**settings: Any) -> Any:
        settings["cfg_overrides"] |= {"d_in": d_in, "d_sae": d_sae}
        return loader(**settings)

    with (
        mock.patch.object(pretrained_sae_loaders, "hf_hub_download", return_value=str(file)),
        torch.no_grad(),
    ):
        sae = SAE.from_pretrained(repo_id, file.name, converter=sized)
        given = {"saelens_activations": sae.encode(x), "saelens_reconstruction": sae(x)}
    return given, {
        "saelens_class": type(sae).__name__,
        "saelens_hook_name": sae.cfg.metadata.hook_name,
        "saelens_version": version("sae-lens"),
    }
