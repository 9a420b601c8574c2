"""Llamascopium (OpenMOSS's library since 2025, before as lm-saes): `config.json` beside `sae_weights.safetensors`.

Tensors: `W_E` [d, d_sae], `b_E`, `W_D` [d_sae, d], `b_D`, `activation_function.log_jumprelu_threshold` [d_sae] (natural
logarithm) and `dataset_average_activation_norm.<hook point>`, the mean norms, scalars. Llama Scope R1-Distill is older:
`encoder.weight` [d_sae, d], `encoder.bias`, `decoder.weight` [d, d_sae], `decoder.bias`, `log_jumprelu_threshold`.

Rules, of `models/sae.py` and `models/sparse_dictionary.py` at 95281ac7, R1-Distill's of `sae.py` at b5c5bb22:

    z = s_in x, h = z @ W_E + b_E, x^ = (f @ W_D + b_D) / s_out        f_i = h_i where act(h_i |d_i|) lets it through

s = sqrt(d) / mean norm with `dataset-wise`, 1 with `inference`; token-wise: sqrt(d) / |x|. Without
`sparsity_include_decoder_norm`, act sees h_i alone. Thresholds are compared in the space that was trained in: for
dataset-wise that is before any folding. The library's own folding, `standardize_parameters_of_dataset_norm`, changes
h |d| by 1 / s_out and leaves the threshold, so a JumpReLU SAE that it has folded turns on other features than the one
that was trained (its cross-layer transcoders' folding does change the threshold). A checkpoint that says `inference` is
taken as it stands. One that was folded while its `config.json`, which the library writes before training, still says
`dataset-wise` cannot be told from one that was not; the library reads both alike, and so does this.

With `sparsity_include_decoder_norm` activations here are what act sees, in units of the stream, h_i |d_i| / s_out, and
decoder rows have unit norm: the reconstruction is the library's, its activations are these times s_out / |d_i|.
BatchTopK depends on the batch, so a server needs `?threshold=`, in units of what act sees in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from sae_models.activation import Activation
from sae_models.architectures import REFUSED, batchtopk, jumprelu, relu, topk
from sae_models.checkpoint import Checkpoint
from sae_models.families import openmoss
from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import scaled
from sae_models.sae import SAE, Weights
from sae_models.tensor_source import TensorSource, check_tensor

NAME = "Llamascopium"
LAYOUT = f"config.json with sae_type, {openmoss.DOCUMENTED}"
VERSIONS = "OpenMOSS 2025 and 2026; Llama Scope R1-Distill"
ARCHITECTURES = (
    "relu",
    "topk",
    "batchtopk",
    "jumprelu",
    "transcoder",
    "topk_transcoder",
    "batchtopk_transcoder",
    "jumprelu_transcoder",
)

CONFIG = "config.json"
MEAN_NORM = "dataset_average_activation_norm."

_NOT_SERVED = {
    "crosscoder": REFUSED["crosscoder"],
    "clt": "it is one cross-layer transcoder of all layers, whose features write to every layer above",
    "lorsa": "its features read other tokens through an attention of its own",
    "molt": "its features are matrices, which no single decoder row holds",
    "mixcoder": "its features belong to one modality each",
}
_ACT_FNS = ("relu", "jumprelu", "topk", "batchtopk")


@dataclass(frozen=True)
class Names:
    """Names of tensors, and along which axes of the matrices the features lie."""

    W_enc: str
    b_enc: str
    W_dec: str
    b_dec: str
    log_threshold: str
    enc_axis: Literal[0, 1]
    dec_axis: Literal[0, 1]

    def after(self, prefix: str) -> Names:
        return replace(
            self,
            W_enc=prefix + self.W_enc,
            b_enc=prefix + self.b_enc,
            W_dec=prefix + self.W_dec,
            b_dec=prefix + self.b_dec,
            log_threshold=prefix + self.log_threshold,
        )

    def shapes(self, d: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        """Of what every checkpoint has."""
        along, across = (d_sae, d), (d, d_sae)
        return {
            self.W_enc: across if self.enc_axis else along,
            self.b_enc: (d_sae,),
            self.W_dec: across if self.dec_axis else along,
        }


NEW = Names("W_E", "b_E", "W_D", "b_D", "activation_function.log_jumprelu_threshold", 1, 0)
R1_DISTILL = Names("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "log_jumprelu_threshold", 0, 1)
R1_REPOSITORY, R1_MODEL = "Llama-Scope-R1-Distill", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


def detect(checkpoint: Checkpoint) -> bool:
    path = openmoss.folder(checkpoint) / CONFIG
    if not path.is_file() or openmoss.weights_path(checkpoint) is None:
        return False
    config = checkpoint.config(_config_file(checkpoint))
    return "sae_type" in config or {"expansion_factor", "act_fn", "hook_point_in"} <= config.keys()


def load(checkpoint: Checkpoint) -> SAE:
    folder, config_file = openmoss.folder(checkpoint), _config_file(checkpoint)
    config = checkpoint.config(config_file)
    kind = config.get("sae_type", "sae")
    if kind in _NOT_SERVED:
        raise checkpoint.error(f"sae_type={kind!r} is not supported: {_NOT_SERVED[kind]}")
    checkpoint.choice(config, "sae_type", ("sae",))
    openmoss.refuse_glu(checkpoint, config)
    d = checkpoint.count(config, "d_model")
    d_sae = _d_sae(checkpoint, config, d)
    hook, hook_out = _hooks(checkpoint, config)
    hook_points = checkpoint.hook_points(hook)
    is_transcoder = hook != hook_out
    hook_points_out = checkpoint.hook_points_out(hook_out) if is_transcoder else hook_points
    act_fn = checkpoint.choice(config, "act_fn", _ACT_FNS)
    threshold = _threshold(checkpoint) if act_fn == "batchtopk" else None
    k = openmoss.top_k(checkpoint, config, d_sae) if act_fn == "topk" else None
    norm = checkpoint.choice(config, "norm_activation", ("dataset-wise", "inference", *openmoss.NORMS_OF_INPUTS))
    openmoss.refuse_norm(checkpoint, norm, is_transcoder)
    has_bias = openmoss.flag(checkpoint, config, "use_decoder_bias", default=True)
    by_norm = openmoss.flag(checkpoint, config, "sparsity_include_decoder_norm", default=True)
    bias_read = has_bias and openmoss.flag(checkpoint, config, "apply_decoder_bias_to_pre_encoder", default=False)

    source, prefix = openmoss.opened(checkpoint)
    names = (R1_DISTILL if prefix + R1_DISTILL.W_enc in source.names() else NEW).after(prefix)
    shapes = names.shapes(d, d_sae)
    if has_bias:
        shapes[names.b_dec] = (d,)
    if act_fn == "jumprelu":
        shapes[names.log_threshold] = (d_sae,)
    s_in = s_out = 1.0
    if norm == "dataset-wise":
        s_in = math.sqrt(d) / _mean_norm(checkpoint, source, f"{prefix}{MEAN_NORM}{hook}", "norm")
        s_out = s_in
        if is_transcoder:
            s_out = math.sqrt(d) / _mean_norm(checkpoint, source, f"{prefix}{MEAN_NORM}{hook_out}", "norm_out")
    norms = {name for name in source.names() if name.startswith(prefix + MEAN_NORM)}
    checkpoint.refuse_unknown_tensors(source, shapes.keys() | norms)
    sha256 = checkpoint.verified([config_file], [(source, shapes)])
    bias = source.read(names.b_dec).double() if has_bias else torch.zeros(d, dtype=torch.float64)
    input_map = scaled(s_in)
    activation = _activation(source, names, act_fn, threshold, k, s_out if by_norm else 1.0)
    return SAE(
        name=folder.name,
        family=NAME,
        architecture=openmoss.architecture(act_fn, is_transcoder),
        d_in=d,
        d_out=d,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points_out,
        token_norm="constant_norm" if norm == "token-wise" else "none",
        model_name=checkpoint.option("model") or _model(checkpoint),
        skip_first=0,
        folder=folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, names.W_enc, names.enc_axis, sha256),
            W_dec=FeatureMatrix(source, names.W_dec, names.dec_axis, sha256),
            b_dec=bias,
            activation=replace(activation, rescale_by_decoder_norm=by_norm),
            input_map=input_map.then_subtract(bias) if bias_read else input_map,
            output_map=scaled(1 / s_out),
        ),
    )


def _config_file(checkpoint: Checkpoint) -> str:
    return CONFIG if openmoss.folder(checkpoint) == checkpoint.folder else f"../{CONFIG}"


def _d_sae(checkpoint: Checkpoint, config: Mapping[str, Any], d: int) -> int:
    factor = config.get("expansion_factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= d * factor < 1 << 32:
        raise checkpoint.error(f"expansion_factor must be a number over 0, got {factor!r}")
    return int(d * factor)


def _hooks(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(where it reads, where it writes) as the configuration names them, which its mean norms are named after."""
    hook = config.get("hook_point_in")
    hook_out = config.get("hook_point_out", hook)
    for name in (hook, hook_out):
        if name is not None and not isinstance(name, str):
            raise checkpoint.error(f"a hook point must be a name, got {name!r}")
    return hook, hook_out


def _threshold(checkpoint: Checkpoint) -> float:
    given = checkpoint.option("threshold")
    if given is None:
        raise checkpoint.error(
            "act_fn='batchtopk', which compares the tokens of a batch, and the files have no threshold that stands for "
            "that; add ?threshold=N to the path, the least activation that training kept"
        )
    return float(given)


def _mean_norm(checkpoint: Checkpoint, source: TensorSource, name: str, option: str) -> float:
    if name not in source.names():
        return openmoss.mean_norm(checkpoint, None, option)
    check_tensor(source, name, ())
    return openmoss.mean_norm(checkpoint, source.read(name).item(), option)


def _activation(
    source: TensorSource, names: Names, act_fn: str, threshold: float | None, k: int | None, unit: float
) -> Activation:
    """unit: what thresholds are divided by, where what they are compared with is in units of the stream."""
    b_enc = source.read(names.b_enc).double()
    if act_fn == "jumprelu":
        return jumprelu.canonical(b_enc, source.read(names.log_threshold).double().exp() / unit)
    if threshold is not None:
        return batchtopk.canonical(b_enc, threshold / unit)
    return relu.canonical(b_enc) if k is None else topk.canonical(b_enc, k)


def _model(checkpoint: Checkpoint) -> str | None:
    return R1_MODEL if any(R1_REPOSITORY in part for part in checkpoint.parts) else None
