"""Gemma Scope 2: JumpReLU SAEs and transcoders of Gemma 3, `params.safetensors` with or without `config.json`.

Folders: `{resid_post,attn_out,mlp_out,transcoder}[_all]/layer_L_width_W_l0_S[_affine]/params.safetensors`, and
`clt/width_W_l0_S[_affine]/params_layer_L.safetensors`. Where `config.json` is missing, places and model are read from
these names and the repository's, `gemma-scope-2-1b-pt`.

Tensors: `w_enc` [d, d_sae], `w_dec` [d_sae, d], `b_enc`, `b_dec`, `threshold`, and for affine transcoders
`affine_skip_connection` [d_in, d_out], which inputs are multiplied by as it stands. b_dec is not subtracted.
Transcoders read what the MLP reads: the output of `pre_feedforward_layernorm`, its weights included.

A layer of a cross-layer transcoder has `w_dec` [d_sae, layers, d], indexed by the layer that is written to, whatever
layer it reads (circuit-tracer, `load_gemma_scope_2_clt`, takes `w_dec[:, layer:]`). It is read as a transcoder that
writes to its own layer; what it writes further up is left out. (SAELens 6.54 sums its decoders over all layers.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sae_models.architectures import REFUSED, jumprelu
from sae_models.checkpoint import Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.sae import SAE, SkipMatrix, Weights
from sae_models.tensor_source import TensorSource, vector_length

NAME = "Gemma Scope 2"
LAYOUT = "params.safetensors with config.json or named folders, or clt/*/params_layer_<n>.safetensors"
VERSIONS = "Gemma 3: 270m, 1b, 4b, 12b, 27b; pt, it; resid_post, attn_out, mlp_out, transcoder, clt"
ARCHITECTURES = (
    "jumprelu",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    "jumprelu_clt_own_layer",
    "jumprelu_skip_clt_own_layer",
)

CONFIG, PARAMS, SKIP = "config.json", "params.safetensors", "affine_skip_connection"

_ONE_OF_SEVERAL = re.compile(r"params_layer_(\d+)\.safetensors")
_FOLDER = re.compile(r"layer_(\d+)_width_")
_SITE = re.compile(r"(resid_post|attn_out|mlp_out|transcoder|clt)(?:_all)?")
_REPOSITORY = re.compile(r"gemma-scope-2-(\d+[mb])-(pt|it)(?![a-z])")
_MLP_IN = "model.layers.{}.pre_feedforward_layernorm.output"
_MLP_OUT = "model.layers.{}.post_feedforward_layernorm.output"
_PLACES: dict[str, tuple[str, str]] = {
    "resid_post": ("model.layers.{}.output", "model.layers.{}.output"),
    "attn_out": ("model.layers.{}.self_attn.o_proj.input", "model.layers.{}.self_attn.o_proj.input"),
    "mlp_out": (_MLP_OUT, _MLP_OUT),
    "transcoder": (_MLP_IN, _MLP_OUT),
    "clt": (_MLP_IN, _MLP_OUT),
}
"""Where each kind of folder reads and writes."""


def detect(checkpoint: Checkpoint) -> bool:
    if checkpoint.path.is_file() and _ONE_OF_SEVERAL.fullmatch(checkpoint.path.name):
        return True
    return checkpoint.has(PARAMS)


def load(checkpoint: Checkpoint) -> SAE:
    config = checkpoint.config(CONFIG) if checkpoint.has(CONFIG) else {}
    _refuse_crosscoder(checkpoint, config)
    checkpoint.choice(config, "architecture", ("jump_relu",))
    one_of_several = _ONE_OF_SEVERAL.fullmatch(checkpoint.path.name)
    source = checkpoint.tensors(checkpoint.path if one_of_several else checkpoint.file(PARAMS))
    d, d_sae = vector_length(source, "b_dec"), vector_length(source, "b_enc")
    shapes: dict[str, tuple[int, ...]] = {"w_enc": (d, d_sae), "b_enc": (d_sae,), "b_dec": (d,), "threshold": (d_sae,)}
    layer = int(one_of_several[1]) if one_of_several else None
    shapes["w_dec"] = (d_sae, d) if layer is None else (d_sae, _layers(checkpoint, source, layer), d)
    has_skip = SKIP in source.names() or _says_affine(checkpoint, config)
    if has_skip:
        shapes[SKIP] = (d, d)
    said = not one_of_several and isinstance(config.get("hf_hook_point_in"), str)
    site = None if said else _site(checkpoint)
    hook, hook_out = _said(config) if said else _named(site, _layer(checkpoint) if layer is None else layer)
    hook_points = checkpoint.hook_points(hook)
    is_transcoder = (
        has_skip
        or site in ("transcoder", "clt")
        or hook_out != hook
        or checkpoint.option("hook_out") is not None
        or any(point.kind == "mlp_in" for point in hook_points)
    )
    hook_points_out = checkpoint.hook_points_out(hook_out) if is_transcoder else hook_points
    checkpoint.refuse_unknown_tensors(source, shapes)
    places = [str(point) for point in (*hook_points, *hook_points_out)]
    sha256 = checkpoint.verified([CONFIG] if config else [], [(source, shapes)], places)
    kind = "_clt_own_layer" if one_of_several else "_transcoder" if is_transcoder else ""
    return SAE(
        name=checkpoint.path.stem if one_of_several else checkpoint.folder.name,
        family=NAME,
        architecture=f"jumprelu{'_skip' if has_skip else ''}{kind}",
        d_in=d,
        d_out=d,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points_out,
        token_norm="none",
        model_name=checkpoint.option("model") or _model(checkpoint, config),
        skip_first=0,
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, "w_enc", 1, sha256),
            W_dec=FeatureMatrix(source, "w_dec", 0, sha256, middle=layer),
            b_dec=source.read("b_dec").double(),
            activation=jumprelu.canonical(source.read("b_enc"), source.read("threshold")),
            W_skip=SkipMatrix(source, SKIP, transposed=True) if has_skip else None,
        ),
    )


def _refuse_crosscoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    if config.get("type") == "crosscoder" or "crosscoder" in checkpoint.parts[-3:]:
        raise checkpoint.error(f"crosscoders are not supported: {REFUSED['crosscoder']}")


def _layers(checkpoint: Checkpoint, source: TensorSource, layer: int) -> int:
    """How many layers the decoder of one layer of a cross-layer transcoder writes to."""
    shape = source.shape("w_dec") if "w_dec" in source.names() else (0, 0, 0)
    if len(shape) != 3:
        raise checkpoint.error(f"w_dec has shape {list(shape)}, expected [d_sae, layers, d] in a file of one layer")
    if "w_dec" in source.names() and layer >= shape[1]:
        raise checkpoint.error(f"w_dec writes to {shape[1]} layers, and the file's name says that it is layer {layer}")
    return shape[1]


def _says_affine(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    folder = checkpoint.parts[-2 if checkpoint.path.is_file() else -1]
    return bool(config.get("affine_connection", folder.endswith("_affine")))


def _site(checkpoint: Checkpoint) -> str | None:
    return next((match[1] for part in reversed(checkpoint.parts) if (match := _SITE.fullmatch(part))), None)


def _layer(checkpoint: Checkpoint) -> int | None:
    named = next((match[1] for part in reversed(checkpoint.parts) if (match := _FOLDER.match(part))), None)
    return None if named is None else int(named)


def _said(config: Mapping[str, Any]) -> tuple[str, str]:
    """(where it reads, where it writes) by the configuration."""
    hook, hook_out = config["hf_hook_point_in"], config.get("hf_hook_point_out")
    return hook, hook_out if isinstance(hook_out, str) else hook


def _named(site: str | None, layer: int | None) -> tuple[str | None, str | None]:
    """(where it reads, where it writes) by the names on the path."""
    if layer is None or site is None:
        return None, None
    reads, writes = _PLACES[site]
    return reads.format(layer), writes.format(layer)


def _model(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """The model's name on the Hub. The smallest one's base model has no ending there."""
    name = config.get("model_name")
    if not isinstance(name, str):
        repository = next((match for part in reversed(checkpoint.parts) if (match := _REPOSITORY.search(part))), None)
        if repository is None:
            return None
        name = f"gemma-3-{repository[1]}-{repository[2]}"
    name = name.removeprefix("google/").replace("gemma-v3", "gemma-3")
    return "google/" + (name.removesuffix("-pt") if "270m" in name else name)
