"""qresearch's SAEs of DeepSeek-R1 distillations and Llama 3.2: `<model>-SAE-l<n>.pt`, two `nn.Linear` and a ReLU.

Format: github.com/qrsch/SAE, `SAE.ipynb`. That notebook reads the input of decoder layer n, which is the output of the
layer before it, and so does this loader. SAELens takes the output of layer n: ?hook=blocks.<n>.hook_resid_post.
"""

from __future__ import annotations

import re

from sae_models.architectures import relu
from sae_models.checkpoint import Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.sae import SAE, Weights

NAME = "DeepSeek-R1 (qresearch)"
LAYOUT = "<model>-SAE-l<n>.pt"
VERSIONS = "DeepSeek-R1-Distill-Llama-8B, DeepSeek-R1-Distill-Llama-70B, Llama-3.2-1B-Instruct"
ARCHITECTURES = (relu.NAME,)

_MODELS = {
    "DeepSeek-R1-Distill-Llama-8B": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "DeepSeek-R1-Distill-Llama-70B": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    "Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B-Instruct",
}
_FILE = rf"(?P<model>{'|'.join(map(re.escape, _MODELS))})-SAE-l(?P<layer>\d+)\.pt"


def detect(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.files(_FILE))


def load(checkpoint: Checkpoint) -> SAE:
    path = checkpoint.only_file(_FILE)
    match = re.fullmatch(_FILE, path.name)
    assert match is not None
    source = checkpoint.tensors(path)
    d_sae, d_in = checkpoint.length(source, "encoder.bias"), checkpoint.length(source, "decoder.bias")
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "decoder.weight": (d_in, d_sae),
        "decoder.bias": (d_in,),
    }
    checkpoint.refuse_unknown_tensors(source, shapes)
    sha256 = checkpoint.verified([], [(source, shapes)], [f"layer {match['layer']}"])
    hook_points = checkpoint.hook_points(f"model.layers.{match['layer']}.input")
    return SAE(
        name=path.stem,
        family=NAME,
        architecture=relu.NAME,
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points,
        token_norm="none",
        model_name=checkpoint.option("model") or _MODELS[match["model"]],
        skip_first=0,
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, "encoder.weight", 0, sha256),
            W_dec=FeatureMatrix(source, "decoder.weight", 1, sha256),
            b_dec=source.read("decoder.bias").double(),
            activation=relu.canonical(source.read("encoder.bias")),
        ),
    )
