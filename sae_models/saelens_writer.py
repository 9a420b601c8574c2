"""Write a canonical SAE as a SAELens checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sae_models.errors import SAEFormatError
from sae_models.families.saelens import CONFIG, WEIGHTS
from sae_models.sae import SAE
from sae_models.safetensors_writer import writable_tensors

_NORMS = {"none": "none", "constant_norm": "constant_norm_rescale", "layer_norm": "layer_norm"}


def saelens_architecture(sae: SAE) -> str:
    """The name of `sae`'s kind in `cfg.json`. SAELens reads all but groupmax, switch and TopK transcoders."""
    selection, threshold = sae.selection, sae.weights.activation.threshold
    if bool((threshold < 0).any()) and not (selection is not None and selection.absolute):
        raise SAEFormatError("an SAE that keeps negative activations cannot be written in SAELens' format")
    if selection is None:
        kind = "jumprelu" if bool((threshold != 0).any()) else "standard"
    elif selection.routed:
        kind = "switch"
    elif selection.groups > 1:
        kind = "groupmax"
    else:
        kind = "abstopk" if selection.absolute else "topk"
    if not sae.is_transcoder and sae.weights.W_skip is None:
        return kind
    ending = "transcoder" if sae.weights.W_skip is None else "skip_transcoder"
    if kind in ("standard", "jumprelu", "topk"):
        return ending if kind == "standard" else f"{kind}_{ending}"
    raise SAEFormatError(f"a {kind} transcoder cannot be written in SAELens' format")


def save_saelens(
    sae: SAE,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `sae` to `folder`, everything folded, so that its activations and reconstructions stay what they are.

    progress: told of (features written, d_sae) as it goes. It holds one block of features; the rest is pages of the
    files themselves. Raises SAEFormatError where SAELens' format has no place for the SAE, OSError where the folder
    cannot be written.
    """
    architecture = saelens_architecture(sae)
    shapes = {
        "W_enc": (sae.d_in, sae.d_sae),
        "b_enc": (sae.d_sae,),
        "W_dec": (sae.d_sae, sae.d_out),
        "b_dec": (sae.d_out,),
    }
    small = {"b_dec": sae.reconstruction_bias()}
    if "jumprelu" in architecture:
        # A feature that is never on has an infinite threshold; nothing finite exceeds the largest number either.
        small["threshold"] = sae.thresholds().clamp(max=torch.finfo(dtype).max)
    skip = sae.skip()
    if skip is not None:
        small["W_skip"] = skip
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": _NORMS[sae.token_norm],
        "reshape_activations": "none",
        "metadata": _metadata(sae),
    }
    if "transcoder" in architecture:
        config["d_out"] = sae.d_out
        config["metadata"]["hook_name_out"] = str(sae.hook_points_out[0])
    if sae.selection is not None:
        config["k"] = sae.selection.groups if architecture == "groupmax" else sae.selection.k
        if architecture in ("topk", "abstopk"):
            config["rescale_acts_by_decoder_norm"] = False
        if sae.selection.routed:
            config["experts"] = sae.selection.groups
            small["W_router"], small["b_router"] = sae.router()
    folder.mkdir(parents=True, exist_ok=True)
    written = writable_tensors(
        folder / WEIGHTS, shapes | {name: tuple(tensor.shape) for name, tensor in small.items()}, dtype
    )
    for name, tensor in small.items():
        written[name].copy_(tensor)
    for features, encoder, bias, decoder in sae.blocks():
        written["W_enc"][:, features] = encoder.T.to(dtype)
        written["b_enc"][features] = bias.to(dtype)
        written["W_dec"][features] = decoder.to(dtype)
        if progress is not None:
            progress(features.stop, sae.d_sae)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _metadata(sae: SAE) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "model_name": sae.model_name,
        "hook_name": str(sae.hook_points[0]),
        "steer_server": {"name": sae.name, "skip_first": sae.skip_first, "family": sae.family},
    }
    if len(sae.hook_points) > 1:
        metadata["hook_names"] = [str(point) for point in sae.hook_points]
    if sae.is_transcoder and len(sae.hook_points_out) > 1:
        metadata["hook_names_out"] = [str(point) for point in sae.hook_points_out]
    return metadata
