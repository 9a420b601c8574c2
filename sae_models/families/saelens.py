"""SAELens 3 to 6: `cfg.json` beside `sae_weights.safetensors`.

Format: SAELens 6.54, `sae_lens/saes/sae.py` (`save_model`) and, for configurations older than 6,
`loading/pretrained_sae_loaders.py` (`handle_pre_6_0_config`). Since version 6 what describes the model is under
`metadata`; before, all keys are flat and some have other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sae_models.activation import Activation
from sae_models.architectures import (
    REFUSED,
    SAME_AT_INFERENCE,
    abstopk,
    gated,
    groupmax,
    jumprelu,
    prolu,
    relu,
    switch,
    topk,
)
from sae_models.checkpoint import Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import IDENTITY, AffineMap, scaled, whitening
from sae_models.sae import SAE, SkipMatrix, Weights
from sae_models.tensor_source import TensorSource
from sae_models.token_norm import TokenNorm

NAME = "SAELens"
LAYOUT = "cfg.json, sae_weights.safetensors"
VERSIONS = "3 to 6"

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
"""Beside a checkpoint of training, whose normalisation is not folded yet."""

# What an architecture's encoder does, and whether its decoder writes elsewhere, along a skip matrix or not.
_KINDS: dict[str, tuple[str, bool, bool]] = {
    "standard": ("relu", False, False),
    "gated": ("gated", False, False),
    "jumprelu": ("jumprelu", False, False),
    "prolu": ("prolu", False, False),
    "topk": ("topk", False, False),
    "hierarchical_topk": ("topk", False, False),
    "abstopk": ("abstopk", False, False),
    "groupmax": ("groupmax", False, False),
    "switch": ("switch", False, False),
    "transcoder": ("relu", True, False),
    "skip_transcoder": ("relu", True, True),
    "jumprelu_transcoder": ("jumprelu", True, False),
    "jumprelu_skip_transcoder": ("jumprelu", True, True),
    "topk_transcoder": ("topk", True, False),
    "topk_skip_transcoder": ("topk", True, True),
    **{name: ("jumprelu" if base == "batchtopk" else base, False, False) for name, base in SAME_AT_INFERENCE.items()},
}
ARCHITECTURES = tuple(_KINDS)
"""The names that `architecture` may have: SAELens' own, and ours for what SAELens has none for."""

_NORMS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening")
_TOKEN_NORMS: dict[str, TokenNorm] = {"constant_norm_rescale": "constant_norm", "layer_norm": "layer_norm"}
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}


def detect(checkpoint: Checkpoint) -> bool:
    return checkpoint.has(CONFIG, WEIGHTS)


def load(checkpoint: Checkpoint) -> SAE:
    config = _current(checkpoint, checkpoint.config(CONFIG))
    metadata = config["metadata"]
    architecture = str(config.get("architecture", "standard"))
    if architecture in REFUSED:
        raise checkpoint.error(f"{architecture} SAEs are not supported: {REFUSED[architecture]}")
    checkpoint.choice(config, "architecture", ARCHITECTURES)
    encoder, writes_elsewhere, has_skip = _KINDS[architecture]
    d_in, d_sae = checkpoint.count(config, "d_in"), checkpoint.count(config, "d_sae")
    d_out = checkpoint.count(config, "d_out") if writes_elsewhere else d_in
    source = checkpoint.tensors(checkpoint.file(WEIGHTS))
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(_PARAMETERS[encoder], (d_sae,))
    if has_skip:
        shapes["W_skip"] = (d_out, d_in)
    if encoder == "switch":
        experts = checkpoint.count(config, "experts")
        shapes |= {"W_router": (d_in, experts), "b_router": (experts,)}
    _refuse_scaling_factor(checkpoint, source)
    b_dec_read = not writes_elsewhere and bool(config.get("apply_b_dec_to_input", True))
    hook_points = checkpoint.hook_points(metadata.get("hook_names") or metadata.get("hook_name"))
    hook_points_out = hook_points
    if writes_elsewhere:
        hook_points_out = checkpoint.hook_points_out(metadata.get("hook_names_out") or metadata.get("hook_name_out"))
    k = _k(checkpoint, config, encoder, d_sae)
    configs = [CONFIG, SCALER] if checkpoint.has(SCALER) else [CONFIG]
    sha256 = checkpoint.verified(configs, [(source, shapes), *_whitening_tensors(checkpoint, config, d_in)])
    input_map, output_map, token_norm = _normalisation(checkpoint, config, d_in)
    b_dec = source.read("b_dec").double()
    ours = metadata.get("steer_server") or {}
    return SAE(
        name=str(ours.get("name", checkpoint.folder.name)),
        family=NAME,
        architecture=architecture,
        d_in=d_in,
        d_out=d_out,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points_out,
        token_norm=token_norm,
        model_name=checkpoint.option("model") or metadata.get("model_name"),
        skip_first=int(ours.get("skip_first", 0)),
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, "W_enc", 1, sha256),
            W_dec=FeatureMatrix(source, "W_dec", 0, sha256),
            b_dec=b_dec,
            activation=_activation(encoder, config, source, k),
            input_map=input_map.then_subtract(b_dec) if b_dec_read else input_map,
            output_map=output_map,
            W_skip=SkipMatrix(source, "W_skip") if has_skip else None,
            router=_router(source) if encoder == "switch" else None,
        ),
    )


def _current(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as version 6 would write it."""
    if "metadata" in config:
        if not isinstance(config["metadata"] or {}, dict):
            raise checkpoint.error("not a SAELens 6 configuration (an object with an object `metadata`)")
        return config | {"metadata": config["metadata"] or {}}
    flat = {_RENAMED.get(name, name): value for name, value in config.items()}
    if flat.get("activation_fn", "relu") == "topk":
        flat["architecture"] = "topk"
        flat["k"] = (flat.get("activation_fn_kwargs") or {}).get("k")
    elif flat.get("activation_fn", "relu") != "relu":
        raise checkpoint.error(f"activation_fn={flat['activation_fn']!r} is not supported; supported: relu, topk")
    norm = flat.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        flat["normalize_activations"] = "expected_average_only_in" if norm else "none"
    return flat | {"metadata": flat}


_PARAMETERS = {
    "relu": relu.PARAMETERS,
    "gated": gated.PARAMETERS,
    "jumprelu": jumprelu.PARAMETERS,
    "prolu": prolu.PARAMETERS,
    "topk": topk.PARAMETERS,
    "abstopk": abstopk.PARAMETERS,
    "groupmax": groupmax.PARAMETERS,
    "switch": switch.PARAMETERS,
}


def _activation(encoder: str, config: Mapping[str, Any], source: TensorSource, k: int | None) -> Activation:
    parameters = {name: source.read(name) for name in _PARAMETERS[encoder]}
    rescale = bool(config.get("rescale_acts_by_decoder_norm", False))
    if encoder == "relu":
        return relu.canonical(**parameters)
    if encoder == "gated":
        return gated.canonical(**parameters)
    if encoder == "jumprelu":
        return jumprelu.canonical(**parameters)
    if encoder == "prolu":
        return prolu.canonical(**parameters)
    assert k is not None
    if encoder == "topk":
        return topk.canonical(**parameters, k=k, rescale_by_decoder_norm=rescale)
    if encoder == "abstopk":
        return abstopk.canonical(**parameters, k=k, rescale_by_decoder_norm=rescale)
    if encoder == "groupmax":
        return groupmax.canonical(**parameters, k=k)
    return switch.canonical(**parameters, k=k, experts=source.shape("b_router")[0])


def _k(checkpoint: Checkpoint, config: Mapping[str, Any], encoder: str, d_sae: int) -> int | None:
    """Active features per token, where the architecture has such a number."""
    if encoder not in ("topk", "abstopk", "groupmax", "switch"):
        return None
    given = checkpoint.option("k")
    k = checkpoint.count(config, "k") if given is None else int(given)
    experts = checkpoint.count(config, "experts") if encoder == "switch" else 0
    if experts and d_sae % experts:
        raise checkpoint.error(f"d_sae={d_sae} cannot be divided among {experts} experts")
    most = d_sae // experts if experts else d_sae
    if k > most:
        raise checkpoint.error(f"k={k} is larger than {'the features of an expert, ' if experts else 'd_sae='}{most}")
    if encoder == "groupmax" and d_sae % k:
        raise checkpoint.error(f"d_sae={d_sae} cannot be divided into k={k} groups")
    return k


def _normalisation(
    checkpoint: Checkpoint, config: Mapping[str, Any], d_in: int
) -> tuple[AffineMap, AffineMap, TokenNorm]:
    """(into training space, out of it, norm per token)."""
    norm = checkpoint.choice(config, "normalize_activations", _NORMS)
    if config.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise checkpoint.error(f"reshape_activations={config['reshape_activations']!r} is not supported")
    if norm == "covariance_whitening":
        ((source, shapes),) = _whitening_tensors(checkpoint, config, d_in)
        return *whitening(*(source.read(name) for name in shapes)), "none"
    if norm != "expected_average_only_in":
        return IDENTITY, IDENTITY, _TOKEN_NORMS.get(norm, "none")
    factor = _scaling_factor(checkpoint, d_in)
    return scaled(factor), scaled(1 / factor), "none"


def _whitening_tensors(
    checkpoint: Checkpoint, config: Mapping[str, Any], d_in: int
) -> list[tuple[TensorSource, dict[str, tuple[int, ...]]]]:
    """What `whitening` takes, in its order, where the activations are whitened."""
    if config.get("normalize_activations") != "covariance_whitening":
        return []
    if not checkpoint.has(WHITENING):
        raise checkpoint.error(
            f"normalize_activations='covariance_whitening', but {WHITENING} is missing; save the SAE with SAELens' "
            "save_inference_model, which folds the whitening into the weights"
        )
    source = checkpoint.tensors(checkpoint.file(WHITENING))
    return [(source, {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)})]


def _scaling_factor(checkpoint: Checkpoint, d_in: int) -> float:
    """What activations are multiplied by: sqrt(d_in) over their mean norm."""
    mean_norm = checkpoint.option("norm")
    if mean_norm is not None:
        return d_in**0.5 / float(mean_norm)
    if not checkpoint.has(SCALER):
        raise checkpoint.error(
            "normalize_activations='expected_average_only_in', but the factor is not in the checkpoint; add ?norm=N to "
            "the path, the mean L2 norm of the activations that it was trained on (sqrt(d_in) divided by SAELens' "
            "norm_scaling_factor)"
        )
    factor = checkpoint.config(SCALER).get("scaling_factor")
    if not isinstance(factor, float) or not 0 < factor < float("inf"):
        raise checkpoint.error(f"scaling_factor of {SCALER} must be a number over 0, got {factor!r}")
    return factor


def _refuse_scaling_factor(checkpoint: Checkpoint, source: TensorSource) -> None:
    if "scaling_factor" in source.names() and not bool((source.read("scaling_factor") == 1).all()):
        raise checkpoint.error(
            "it has finetuned scaling factors, which SAELens 6 does not read either; fold them into W_dec first"
        )


def _router(source: TensorSource) -> tuple[torch.Tensor, torch.Tensor]:
    return source.read("W_router").double(), source.read("b_router").double()
