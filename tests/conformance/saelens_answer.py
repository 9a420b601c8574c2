"""What SAELens' loaders make of a published layout that lies on this disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders

Loader = Callable[..., Any]

HEADS = 4


def saelens_answer(
    loader: Loader,
    repository: Path,
    folder: str,
    x: torch.Tensor,
    *,
    overrides: dict[str, Any] | None = None,
    norm_scaling_factor: float | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Its answer, or its error, for the SAE in `folder` of a repository that lies in the folder `repository`.

    overrides: what it takes from its own table of published models rather than from the files, such as widths.
    norm_scaling_factor: what its table of releases holds.
    """

    def local_file(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        path = repository / subfolder / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(f"no {path}")
        return str(path)

    def local_shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        data = (repository / filename).read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        return {name: info["shape"] for name, info in header.items() if name != "__metadata__"}

    def converter(cfg_overrides: dict[str, Any], **arguments: Any) -> Any:
        return loader(cfg_overrides=cfg_overrides | (overrides or {}), **arguments)

    notes = {"saelens_version": version("sae-lens")}
    try:
        with (
            mock.patch.object(pretrained_sae_loaders, "hf_hub_download", local_file),
            mock.patch.object(pretrained_sae_loaders, "get_safetensors_tensor_shapes", local_shapes),
            torch.no_grad(),
        ):
            sae = SAE.from_pretrained(f"google/{repository.name}", folder, converter=converter)
            if norm_scaling_factor is not None:
                sae.fold_activation_norm_scaling_factor(norm_scaling_factor)
            # It takes z as attention gives it, one vector for each head.
            fed = x.unflatten(-1, (HEADS, -1)) if sae.cfg.reshape_activations == "hook_z" else x
            answer = {"saelens_activations": sae.encode(fed), "saelens_reconstruction": sae(fed).reshape(x.shape)}
    except Exception as error:
        return {}, notes | {"saelens_error": f"{type(error).__name__}: {error}"}
    metadata = sae.cfg.metadata
    return answer, notes | {
        "saelens_class": type(sae).__name__,
        "saelens_hook_name": str(metadata.hook_name),
        "saelens_hook_name_out": str(metadata.get("hook_name_out")),
        "saelens_model_name": str(metadata.model_name),
    }
