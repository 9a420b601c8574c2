"""Goodfire's releases: one pickle for each SAE, told apart by the tensors in it.

Llama 3.1 8B and 3.3 70B: a ReLU SAE of two `nn.Linear`, as in the model cards' example; their names and layers are in
the file's name. DeepSeek-R1: one matrix for encoder and decoder, BatchTopK, k in `config.json`
(github.com/goodfire-ai/r1-interpretability, `sae.py`). That one has no threshold: its own code takes the largest of
whatever batch it is given, so that a token's activations depend on the tokens around it. Of a token by itself it takes
the k largest, which is what is served; option `threshold` serves BatchTopK instead.
"""

from __future__ import annotations

import re

from sae_models.activation import Activation
from sae_models.architectures import batchtopk, relu, topk
from sae_models.checkpoint import Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.sae import SAE, Weights
from sae_models.tensor_source import TensorSource

NAME = "Goodfire"
LAYOUT = "<model>-SAE-l<n>.pt or .pth; of DeepSeek-R1 beside config.json"
VERSIONS = "Llama-3.1-8B-Instruct, Llama-3.3-70B-Instruct, DeepSeek-R1"
ARCHITECTURES = (relu.NAME, topk.NAME, batchtopk.NAME)

CONFIG = "config.json"
_MODELS = {
    "Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "Llama-3.3-70B-Instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "DeepSeek-R1": "deepseek-ai/DeepSeek-R1",
}
_FILE = rf"(?P<model>{'|'.join(map(re.escape, _MODELS))})-SAE-l(?P<layer>\d+)\.pth?"
_LINEAR = frozenset({"encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias"})
_TIED = frozenset({"W", "b_enc", "b_dec"})


def detect(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.files(_FILE)) or checkpoint.pickled_names() in (_LINEAR, _TIED)


def load(checkpoint: Checkpoint) -> SAE:
    path = checkpoint.only_file(_FILE) if checkpoint.files(_FILE) else checkpoint.path
    match = re.fullmatch(_FILE, path.name)
    source = checkpoint.tensors(path)
    tied = "W" in source.names()
    W_enc, W_dec = ("W", "W") if tied else ("encoder_linear.weight", "decoder_linear.weight")
    encoder_bias, decoder_bias = ("b_enc", "b_dec") if tied else ("encoder_linear.bias", "decoder_linear.bias")
    d_sae, d_in = checkpoint.length(source, encoder_bias), checkpoint.length(source, decoder_bias)
    # A tied matrix lies as a decoder's does.
    shapes: dict[str, tuple[int, ...]] = {W_enc: (d_sae, d_in), encoder_bias: (d_sae,), decoder_bias: (d_in,)}
    shapes |= {W_dec: (d_in, d_sae)}
    architecture, activation = _tied(checkpoint, source, d_in, d_sae) if tied else _linear(source)
    checkpoint.refuse_unknown_tensors(source, shapes)
    sha256 = checkpoint.verified(
        [CONFIG] if tied and checkpoint.has(CONFIG) else [],
        [(source, shapes)],
        [f"layer {match['layer']}"] if match else [],
    )
    hook_points = checkpoint.hook_points(f"model.layers.{match['layer']}.output" if match else None)
    return SAE(
        name=path.stem,
        family=NAME,
        architecture=architecture,
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points,
        token_norm="none",
        model_name=checkpoint.option("model") or (_MODELS[match["model"]] if match else None),
        skip_first=0,
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, W_enc, 1 if tied else 0, sha256),
            W_dec=FeatureMatrix(source, W_dec, 1, sha256),
            b_dec=source.read(decoder_bias).double(),
            activation=activation,
        ),
    )


def _linear(source: TensorSource) -> tuple[str, Activation]:
    return relu.NAME, relu.canonical(source.read("encoder_linear.bias"))


def _tied(checkpoint: Checkpoint, source: TensorSource, d_in: int, d_sae: int) -> tuple[str, Activation]:
    """(architecture, activation) of DeepSeek-R1's; `config.json` must be about these tensors."""
    b_enc = source.read("b_enc")
    config = checkpoint.config(CONFIG) if checkpoint.has(CONFIG) else {}
    if config:
        stated = (checkpoint.count(config, "d_in"), checkpoint.count(config, "expansion_factor"))
        if stated != (d_in, d_sae // d_in) or d_sae % d_in:
            raise checkpoint.error(
                f"{CONFIG} says d_in={stated[0]}, expansion_factor={stated[1]}; the tensors: d_in={d_in}, d_sae={d_sae}"
            )
    threshold = checkpoint.option("threshold")
    if threshold is not None:
        return batchtopk.NAME, batchtopk.canonical(b_enc, threshold)
    k = checkpoint.option("k") or (checkpoint.count(config, "k") if config else None)
    if k is None:
        raise checkpoint.error(
            f"k is in {CONFIG}, which is missing; add ?k=128 to the path (math) or ?k=64 (logic), or ?threshold=T"
        )
    if k > d_sae:
        raise checkpoint.error(f"k={k} is larger than d_sae={d_sae}")
    return topk.NAME, topk.canonical(b_enc, k)
