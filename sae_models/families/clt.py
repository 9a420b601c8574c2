"""One layer of a cross-layer transcoder in circuit-tracer's format: `W_enc_<i>.safetensors`, `W_dec_<i>.safetensors`.

Format: circuit-tracer 0.5, `transcoder/cross_layer_transcoder.py` (`to_safetensors`, `load_clt`); so published are
mntss' for Gemma 2 and Llama 3.2. W_dec_<i> is [d_sae, layers from i onwards, d_model]: the first is that of its own
layer, and the one that is used, so the SAE is a transcoder that leaves out what its features write to later layers.
"""

from __future__ import annotations

import re

from sae_models.checkpoint import Checkpoint
from sae_models.families.circuit_tracer import CONFIG, activation, place, widths
from sae_models.feature_matrix import FeatureMatrix
from sae_models.sae import SAE, Weights

NAME = "circuit-tracer cross-layer transcoders"
LAYOUT = "W_enc_<i>.safetensors, W_dec_<i>.safetensors, config.yaml; only what layer i writes to itself"
VERSIONS = "0.5"
ARCHITECTURES = ("clt_own_layer", "jumprelu_clt_own_layer")
"""Of a whole cross-layer transcoder, only what a layer's features write to that same layer."""

_WEIGHTS = re.compile(r"W_(enc|dec)_(\d+)\.safetensors")


def detect(checkpoint: Checkpoint) -> bool:
    return _WEIGHTS.fullmatch(checkpoint.path.name) is not None or checkpoint.has("W_enc_0.safetensors")


def load(checkpoint: Checkpoint) -> SAE:
    named = _WEIGHTS.fullmatch(checkpoint.path.name)
    if named is None or named[1] != "enc":
        raise checkpoint.error("a cross-layer transcoder; name the encoder of one layer, such as W_enc_5.safetensors")
    layer = int(named[2])
    config = checkpoint.config(CONFIG) if checkpoint.has(CONFIG) else {}
    hook_points = checkpoint.hook_points(place(checkpoint, config, "feature_input_hook", layer))
    hook_points_out = checkpoint.hook_points_out(place(checkpoint, config, "feature_output_hook", layer))
    W_enc, W_dec, b_enc, b_dec, threshold = (
        f"{name}_{layer}" for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    )
    encoder = checkpoint.tensors(checkpoint.path)
    decoder = checkpoint.tensors(checkpoint.folder / f"{W_dec}.safetensors")
    d_in, d_sae = widths(checkpoint, encoder, b_dec, b_enc)
    has_threshold = threshold in encoder.names()
    shapes: dict[str, tuple[int, ...]] = {W_enc: (d_sae, d_in), b_enc: (d_sae,), b_dec: (d_in,)}
    if has_threshold:
        shapes[threshold] = (d_sae,)
    # How many layers the model has, no file says.
    found = decoder.shape(W_dec) if W_dec in decoder.names() else ()
    layers = found[1] if len(found) == 3 else 1
    checkpoint.refuse_unknown_tensors(encoder, shapes)
    configs = [CONFIG] if checkpoint.has(CONFIG) else []
    places = [str(point) for point in (*hook_points, *hook_points_out)]
    sha256 = checkpoint.verified(configs, [(encoder, shapes), (decoder, {W_dec: (d_sae, layers, d_in)})], places)
    return SAE(
        name=f"layer_{layer}",
        family=NAME,
        architecture=f"{'jumprelu_' if has_threshold else ''}clt_own_layer",
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
            W_enc=FeatureMatrix(encoder, W_enc, 0, sha256),
            W_dec=FeatureMatrix(decoder, W_dec, 0, sha256, middle=0),
            b_dec=encoder.read(b_dec).double(),
            activation=activation(encoder, b_enc, threshold if has_threshold else None, None),
        ),
    )
