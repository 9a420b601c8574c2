"""SAEs of tensors in memory, and what they give in float64."""

from pathlib import Path

import torch

from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import IDENTITY
from sae_models.hook_points import HookPoint
from sae_models.sae import SAE, Weights
from sae_models.tensor_source import LoadedTensors
from sae_models.token_norm import token_scales


def sae_of(
    W_enc,
    W_dec,
    b_dec,
    activation,
    input_map=IDENTITY,
    output_map=IDENTITY,
    token_norm="none",
    W_skip=None,
    router=None,
):
    """The canonical SAE of W_enc [d_in, d_sae] and W_dec [d_sae, d_out], float64."""
    source = LoadedTensors(Path("memory"), {"W_enc": W_enc, "W_dec": W_dec})
    matrices = FeatureMatrix(source, "W_enc", 1, "0" * 64), FeatureMatrix(source, "W_dec", 0, "0" * 64)
    weights = Weights(*matrices, b_dec, activation, input_map, output_map, W_skip, router)
    place = (HookPoint(0),)
    return SAE(
        name="memory", family="none", architecture="any", d_in=len(W_enc), d_out=W_dec.shape[1], d_sae=len(W_dec),
        hook_points=place, hook_points_out=place, token_norm=token_norm, model_name=None, skip_first=0,
        folder=Path(), sha256="0" * 64, weights=weights,
    )  # fmt: skip


def encode(sae, x):
    """Activations [n, d_sae] of x [n, d_in], from the folded rows, float64."""
    blocks = list(sae.blocks())
    encoder, bias = (torch.cat([block[i] for block in blocks]) for i in (1, 2))
    a, _ = token_scales(x, sae.token_norm)
    return sae.activate(a * (x @ encoder.T) + bias, x)


def decode(sae, activations, x):
    """The reconstruction [n, d_out], from the folded rows, float64."""
    decoder = torch.cat([block[3] for block in sae.blocks()])
    _, s = token_scales(x, sae.token_norm)
    bias = sae.weights.output_map.apply(sae.weights.b_dec.unsqueeze(0))
    out = s * (activations @ decoder + bias)
    if sae.token_norm == "layer_norm":
        out = out + x.mean(-1, keepdim=True)
    return out if sae.weights.W_skip is None else out + x @ sae.weights.W_skip.T
