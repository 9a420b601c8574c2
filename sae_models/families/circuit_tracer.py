"""circuit-tracer's sets of transcoders: `layer_<i>.safetensors` for each layer, and one `config.yaml`.

Format: circuit-tracer 0.5, `transcoder/single_layer_transcoder.py` (`to_safetensors`, `load_relu_transcoder`) and
`utils/hf_utils.py`. So published are mwhanna's transcoders for Qwen 3 and mntss' for Llama 3.2. A transcoder with
thresholds is JumpReLU, any other ReLU, as for its own loader: that a transcoder is TopK stands in neither file.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from sae_models.activation import Activation
from sae_models.architectures import relu
from sae_models.checkpoint import Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.sae import SAE, SkipMatrix, Weights
from sae_models.selection import Selection
from sae_models.tensor_source import TensorSource

NAME = "circuit-tracer transcoders"
LAYOUT = "layer_<i>.safetensors, config.yaml"
VERSIONS = "0.5"
ARCHITECTURES = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    "topk_transcoder",
    "topk_skip_transcoder",
)

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
_WEIGHTS = re.compile(r"layer_(\d+)\.safetensors")


def detect(checkpoint: Checkpoint) -> bool:
    if checkpoint.path.is_file():
        named = _WEIGHTS.fullmatch(checkpoint.path.name) is not None
        return named and (checkpoint.has(CONFIG) or "W_enc" in checkpoint.tensors(checkpoint.path).names())
    if not checkpoint.has(CONFIG):
        return False
    return bool(_layers(checkpoint)) or b"transcoder_set" in checkpoint.small_file(checkpoint.file(CONFIG))


def load(checkpoint: Checkpoint) -> SAE:
    named = _WEIGHTS.fullmatch(checkpoint.path.name)
    if named is None:
        raise checkpoint.error(_which_layer(checkpoint))
    layer = int(named[1])
    config = checkpoint.config(CONFIG) if checkpoint.has(CONFIG) else {}
    hook_points = checkpoint.hook_points(place(checkpoint, config, "feature_input_hook", layer))
    hook_points_out = checkpoint.hook_points_out(place(checkpoint, config, "feature_output_hook", layer))
    source = checkpoint.tensors(checkpoint.path)
    d_in, d_sae = widths(checkpoint, source, "b_dec", "b_enc")
    has_threshold, has_skip = THRESHOLD in source.names(), "W_skip" in source.names()
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_sae, d_in),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
    }
    if has_threshold:
        # One for all features is a number, or a vector of one.
        found = source.shape(THRESHOLD)
        shapes[THRESHOLD] = found if found in ((), (1,)) else (d_sae,)
    if has_skip:
        shapes["W_skip"] = (d_in, d_in)
    checkpoint.refuse_unknown_tensors(source, shapes)
    k = checkpoint.option("k") if not has_threshold else None
    if k is not None and k > d_sae:
        raise checkpoint.error(f"k={k} is larger than the number of features, {d_sae}")
    configs = [CONFIG] if checkpoint.has(CONFIG) else []
    places = [str(point) for point in (*hook_points, *hook_points_out)]
    sha256 = checkpoint.verified(configs, [(source, shapes)], places)
    encoder = "jumprelu_" if has_threshold else "topk_" if k is not None else ""
    return SAE(
        name=f"layer_{layer}",
        family=NAME,
        architecture=f"{encoder}{'skip_' if has_skip else ''}transcoder",
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points_out,
        token_norm="none",
        model_name=checkpoint.option("model") or config.get("model_name"),
        skip_first=0,
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, "W_enc", 0, sha256),
            W_dec=FeatureMatrix(source, "W_dec", 0, sha256),
            b_dec=source.read("b_dec").double(),
            activation=activation(source, "b_enc", THRESHOLD if has_threshold else None, k),
            W_skip=SkipMatrix(source, "W_skip") if has_skip else None,
        ),
    )


def _layers(checkpoint: Checkpoint) -> list[str]:
    return sorted(path.name for path in checkpoint.folder.iterdir() if _WEIGHTS.fullmatch(path.name))


def _which_layer(checkpoint: Checkpoint) -> str:
    """What to say of a folder: its layers are files, or elsewhere."""
    files = _layers(checkpoint)
    if files:
        return f"a set of {len(files)} transcoders; name the file of one, such as {files[0]}"
    elsewhere = checkpoint.config(CONFIG).get("transcoders")
    if isinstance(elsewhere, list) and elsewhere:
        return f"a list of transcoders that lie elsewhere; load one of them instead, such as {elsewhere[0]}"
    return f"a set of transcoders whose files (layer_<i>.safetensors) are not beside {CONFIG}"


def place(checkpoint: Checkpoint, config: dict[str, Any], key: str, layer: int) -> str | None:
    """The hook point that `config` names without its layer, such as `mlp.hook_in`; None where it names none."""
    name = config.get(key)
    if name is None:
        return None
    if not isinstance(name, str):
        raise checkpoint.error(f"{key} must be the name of a hook point, got {name!r}")
    return f"blocks.{layer}.{name}"


def widths(checkpoint: Checkpoint, source: TensorSource, b_dec: str, b_enc: str) -> tuple[int, int]:
    """(d_in, d_sae), which no configuration says."""
    for name in (b_dec, b_enc):
        if name not in source.names():
            raise checkpoint.error(f"tensor {name} is missing; found: {', '.join(sorted(source.names())) or 'none'}")
        if len(source.shape(name)) != 1:
            raise checkpoint.error(f"{name} has shape {list(source.shape(name))}, expected a vector")
    return source.shape(b_dec)[0], source.shape(b_enc)[0]


def activation(source: TensorSource, b_enc: str, threshold: str | None, k: int | None) -> Activation:
    """Its JumpReLU and TopK have no ReLU: a pre-activation over a threshold below zero, or among the k largest, stays
    what it is when it is negative.
    """
    bias = source.read(b_enc).double()
    if threshold is not None:
        return Activation(bias, source.read(threshold).double().expand_as(bias))
    if k is not None:
        return Activation(bias, torch.full_like(bias, -torch.inf), selection=Selection(int(k)))
    return relu.canonical(bias)
