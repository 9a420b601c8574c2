"""Llama Scope (He et al. 2024, arXiv 2410.20526): `hyperparams.json` beside `checkpoints/final.safetensors`.

Written by OpenMOSS's lm-saes of 2024. Tensors: `encoder.weight` [d_sae, d], `encoder.bias`, `decoder.weight`
[d, d_sae], `decoder.bias`, bfloat16, in training space, where activations have a mean norm of sqrt(d):
z = s_in x, h = z @ W_enc + b_enc, x^ = (f @ W_dec + b_dec) / s_out, with s = sqrt(d) / mean norm.

The threshold is one number, and it is in other units. It was measured (`post_processing.py`) after the library's
`SparseAutoEncoder.from_config` had, in this order, folded the norms so that activations are in units of the stream,
h / s_in, and, with `sparsity_include_decoder_norm`, given the folded decoder rows unit norm. So a feature is on where

    h |d_i| / s_out > threshold    with sparsity_include_decoder_norm, of transcoders too,
    h / s_in > threshold           without,

and those left sides are the activations here, as they are the library's. SAELens 6.54 compares h with s_in threshold
whatever |d_i| is, so it turns on other features; its activations are h.

`top_k` is what JumpReLU SAEs began their training with, and has no use afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sae_models.activation import Activation
from sae_models.architectures import jumprelu, relu, topk
from sae_models.checkpoint import Checkpoint
from sae_models.families import openmoss
from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import IDENTITY, scaled
from sae_models.sae import SAE, Weights

NAME = "Llama Scope"
LAYOUT = f"hyperparams.json, {openmoss.DOCUMENTED}"
VERSIONS = "Llama 3.1 8B: LXR, LXM, LXA, LXTC; lm-saes of 2024"
ARCHITECTURES = ("relu", "topk", "jumprelu", "transcoder", "topk_transcoder", "jumprelu_transcoder")

CONFIG = "hyperparams.json"

_MODELS = {"Llama3_1-8B-Base": "meta-llama/Llama-3.1-8B"}
"""By what the names of folders begin with; the configuration does not say it."""


def detect(checkpoint: Checkpoint) -> bool:
    return (openmoss.folder(checkpoint) / CONFIG).is_file() and openmoss.weights_path(checkpoint) is not None


def load(checkpoint: Checkpoint) -> SAE:
    folder = openmoss.folder(checkpoint)
    config_file = CONFIG if folder == checkpoint.folder else f"../{CONFIG}"
    config = checkpoint.config(config_file)
    openmoss.refuse_glu(checkpoint, config)
    d, d_sae = checkpoint.count(config, "d_model"), checkpoint.count(config, "d_sae")
    hook_points = checkpoint.hook_points(config.get("hook_point_in"))
    is_transcoder = config.get("hook_point_out") not in (None, config.get("hook_point_in"))
    hook_points_out = checkpoint.hook_points_out(config["hook_point_out"]) if is_transcoder else hook_points
    s_in, s_out, by_token = _scales(checkpoint, config, d, is_transcoder)
    source, prefix = openmoss.opened(checkpoint)
    W_enc, b_enc, W_dec, b_dec = (
        f"{prefix}{name}" for name in ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    )
    shapes: dict[str, tuple[int, ...]] = {W_enc: (d_sae, d), b_enc: (d_sae,), W_dec: (d, d_sae)}
    has_bias = openmoss.flag(checkpoint, config, "use_decoder_bias")
    if has_bias:
        shapes[b_dec] = (d,)
    bias_read = openmoss.flag(checkpoint, config, "apply_decoder_bias_to_pre_encoder") and has_bias
    by_norm = openmoss.flag(checkpoint, config, "sparsity_include_decoder_norm")
    act_fn, threshold, k = _act_fn(checkpoint, config, d_sae)
    checkpoint.refuse_unknown_tensors(source, shapes)
    sha256 = checkpoint.verified([config_file], [(source, shapes)])
    bias = source.read(b_dec).double() if has_bias else torch.zeros(d, dtype=torch.float64)
    activation = _activation(act_fn, source.read(b_enc).double() / s_in, threshold, k)
    return SAE(
        name=folder.name,
        family=NAME,
        architecture=openmoss.architecture(act_fn, is_transcoder),
        d_in=d,
        d_out=d,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points_out,
        token_norm="constant_norm" if by_token else "none",
        model_name=checkpoint.option("model") or _model(checkpoint),
        skip_first=0,
        folder=folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, W_enc, 0, sha256),
            W_dec=FeatureMatrix(source, W_dec, 1, sha256),
            b_dec=bias / s_in,
            activation=replace(activation, rescale_by_decoder_norm=by_norm),
            input_map=IDENTITY.then_subtract(bias / s_out) if bias_read else IDENTITY,
            output_map=scaled(s_in / s_out),
        ),
    )


def _scales(
    checkpoint: Checkpoint, config: Mapping[str, Any], d: int, is_transcoder: bool
) -> tuple[float, float, bool]:
    """(s_in, s_out, whether the norm is each token's own)."""
    norm = _written(checkpoint, config, "norm_activation", ("none", "dataset-wise", *openmoss.NORMS_OF_INPUTS))
    if norm == "dataset-wise":
        norms = config.get("dataset_average_activation_norm") or {}
        if not isinstance(norms, dict):
            raise checkpoint.error(f"dataset_average_activation_norm must have `in` and `out`, got {norms!r}")
        mean_in = openmoss.mean_norm(checkpoint, norms.get("in"), "norm")
        has_own = is_transcoder or "out" in norms
        mean_out = openmoss.mean_norm(checkpoint, norms.get("out"), "norm_out") if has_own else mean_in
        return math.sqrt(d) / mean_in, math.sqrt(d) / mean_out, False
    openmoss.refuse_norm(checkpoint, norm, is_transcoder)
    return 1.0, 1.0, norm == "token-wise"


def _written(checkpoint: Checkpoint, config: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    """A string of the configuration, which lists all of them."""
    if key not in config:
        raise checkpoint.error(f"{CONFIG} has no {key}; one of {', '.join(allowed)}")
    return checkpoint.choice(config, key, allowed)


def _act_fn(checkpoint: Checkpoint, config: Mapping[str, Any], d_sae: int) -> tuple[str, float | None, int | None]:
    """(activation function at inference, its threshold, its k)."""
    act_fn = _written(checkpoint, config, "act_fn", ("relu", "topk", "jumprelu"))
    if act_fn == "jumprelu":
        return act_fn, _threshold(checkpoint, config.get("jump_relu_threshold")), None
    return act_fn, None, openmoss.top_k(checkpoint, config, d_sae) if act_fn == "topk" else None


def _threshold(checkpoint: Checkpoint, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    given = checkpoint.option("threshold")
    if given is None:
        raise checkpoint.error(
            f"jump_relu_threshold must be a number over 0, got {value!r}; add ?threshold=N to the path"
        )
    return float(given)


def _activation(act_fn: str, b_enc: torch.Tensor, threshold: float | None, k: int | None) -> Activation:
    if threshold is not None:
        return jumprelu.canonical(b_enc, torch.full_like(b_enc, threshold))
    return relu.canonical(b_enc) if k is None else topk.canonical(b_enc, k)


def _model(checkpoint: Checkpoint) -> str | None:
    return next((model for name, model in _MODELS.items() for part in checkpoint.parts if part.startswith(name)), None)
