"""OpenAI's SAEs of GPT-2 small: `<place>[_<version>]/autoencoders/<layer>.pt`, a state dict that names its activation.

Format: github.com/openai/sparse_autoencoder, `model.py` and `paths.py`. Those with a TopK activation (v5) normalise
each token, and pre_bias is taken off after that; those with a ReLU (v1, v4) read the activations as they are.
"""

from __future__ import annotations

import re

from sae_models.activation import Activation
from sae_models.architectures import relu, topk
from sae_models.checkpoint import Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import IDENTITY
from sae_models.sae import SAE, Weights
from sae_models.tensor_source import LoadedTensors, TensorSource

NAME = "OpenAI GPT-2"
LAYOUT = "<place>[_v4|_v5_32k|_v5_128k]/autoencoders/<layer>.pt"
VERSIONS = "v1, v4, v5"
ARCHITECTURES = (relu.NAME, topk.NAME)

_FILE = r"(\d+)\.pt"
_PLACES = {
    "resid_delta_attn": "blocks.{}.hook_attn_out",
    "resid_post_attn": "blocks.{}.hook_resid_mid",
    "mlp_post_act": "blocks.{}.mlp.hook_post",
    "resid_delta_mlp": "blocks.{}.hook_mlp_out",
    "resid_post_mlp": "blocks.{}.hook_resid_post",
}
_PATH = re.compile(
    rf".*/(?P<release>(?P<place>{'|'.join(_PLACES)})(?:_v\d+(?:_\w+)?)?)/autoencoders(?:/(?P<layer>\d+)\.pt)?"
)
_STATISTICS = frozenset({"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"})
_NAMES = frozenset({"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"})


def detect(checkpoint: Checkpoint) -> bool:
    named = checkpoint.files(_FILE) and _PATH.fullmatch("/".join(checkpoint.parts))
    return bool(named) or checkpoint.pickled_names() >= _NAMES


def load(checkpoint: Checkpoint) -> SAE:
    path = checkpoint.only_file(_FILE) if checkpoint.path.is_dir() else checkpoint.path
    match = _PATH.fullmatch("/".join(checkpoint.parts))
    layer = re.fullmatch(_FILE, path.name)
    place = _PLACES[match["place"]].format(layer[1]) if match and layer else None
    source = checkpoint.tensors(path)
    d_sae, d_in = checkpoint.length(source, "latent_bias"), checkpoint.length(source, "pre_bias")
    architecture, activation = _activation(checkpoint, source, d_sae)
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "decoder.weight": (d_in, d_sae),
        "latent_bias": (d_sae,),
        "pre_bias": (d_in,),
    }
    hook_points = checkpoint.hook_points(place)
    checkpoint.refuse_unknown_tensors(source, _NAMES | _STATISTICS)
    sha256 = checkpoint.verified([], [(source, shapes)], [place] if place else [])
    pre_bias = source.read("pre_bias").double()
    return SAE(
        name=f"{match['release']}/{layer[1]}" if match and layer else path.stem,
        family=NAME,
        architecture=architecture,
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points,
        token_norm="layer_norm" if architecture == topk.NAME else "none",
        model_name=checkpoint.option("model") or "gpt2",
        skip_first=0,
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, "encoder.weight", 0, sha256),
            W_dec=FeatureMatrix(source, "decoder.weight", 1, sha256),
            b_dec=pre_bias,
            activation=activation,
            input_map=IDENTITY.then_subtract(pre_bias),
        ),
    )


def _activation(checkpoint: Checkpoint, source: TensorSource, d_sae: int) -> tuple[str, Activation]:
    """(architecture, activation) that the state dict names; without a name it is a ReLU, as in OpenAI's own reader."""
    values = source.values if isinstance(source, LoadedTensors) else {}
    kind = values.get("activation", "ReLU")
    latent_bias = source.read("latent_bias")
    if kind == "ReLU":
        return relu.NAME, relu.canonical(latent_bias)
    after = values.get("activation_state_dict.postact_fn", "ReLU")
    if kind != "TopK" or after != "ReLU":
        raise checkpoint.error(f"activation={kind!r} with postact_fn={after!r} is not supported; supported: ReLU, TopK")
    k = checkpoint.option("k") or checkpoint.count({"k": values.get("activation_state_dict.k")}, "k")
    if k > d_sae:
        raise checkpoint.error(f"k={k} is larger than d_sae={d_sae}")
    return topk.NAME, topk.canonical(latent_bias, k)
