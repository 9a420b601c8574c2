"""EleutherAI's sparsify: `<hookpoint>/cfg.json` beside `<hookpoint>/sae.safetensors`, in the folder of a run.

Format: sparsify 1.3, `sparsify/sparse_coder.py` (`save_to_disk`, `forward`) and `config.py`; before version 1 it was
called `sae` and had `signed`, which ranks by magnitude. The folder is named after the module whose output it reads, or,
with `transcode`, whose output it predicts from its input; runs with several seeds have one folder more below.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae_models.activation import Activation
from sae_models.architectures import abstopk, groupmax, topk
from sae_models.checkpoint import Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import IDENTITY
from sae_models.sae import SAE, SkipMatrix, Weights
from sae_models.tensor_source import TensorSource

NAME = "sparsify"
LAYOUT = "HOOKPOINT/cfg.json, HOOKPOINT/sae.safetensors"
VERSIONS = "0.1 to 1.3"
ARCHITECTURES = tuple(
    f"{encoder}{ending}"
    for encoder in ("topk", "groupmax", "abstopk")
    for ending in ("", "_skip", "_transcoder", "_skip_transcoder")
)

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def detect(checkpoint: Checkpoint) -> bool:
    return checkpoint.has(CONFIG, WEIGHTS)


def load(checkpoint: Checkpoint) -> SAE:
    config = checkpoint.config(CONFIG)
    d_in = checkpoint.count(config, "d_in")
    d_sae = _d_sae(checkpoint, config, d_in)
    transcode, has_skip = bool(config.get("transcode")), bool(config.get("skip_connection"))
    hookpoint = _hookpoint(checkpoint.folder)
    hook_points = checkpoint.hook_points(f"{hookpoint.name}.input" if transcode else hookpoint.name)
    hook_points_out = checkpoint.hook_points_out(hookpoint.name) if transcode else hook_points
    source = checkpoint.tensors(checkpoint.file(WEIGHTS))
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if has_skip:
        shapes["W_skip"] = (d_in, d_in)
    checkpoint.refuse_unknown_tensors(source, shapes)
    encoder = _encoder(checkpoint, config)
    k = _k(checkpoint, config, encoder, d_sae)
    places = [str(point) for point in (*hook_points, *hook_points_out)]
    sha256 = checkpoint.verified([CONFIG], [(source, shapes)], places)
    b_dec = source.read("b_dec").double()
    return SAE(
        name=hookpoint.name,
        family=NAME,
        architecture=encoder + ("_skip" if has_skip else "") + ("_transcoder" if transcode else ""),
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points_out,
        token_norm="none",
        model_name=checkpoint.option("model") or _model_name(checkpoint, hookpoint.parent),
        skip_first=0,
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, "encoder.weight", 0, sha256),
            W_dec=FeatureMatrix(source, "W_dec", 0, sha256),
            b_dec=b_dec,
            activation=_activation(encoder, source, k),
            input_map=IDENTITY if transcode else IDENTITY.then_subtract(b_dec),
            W_skip=SkipMatrix(source, "W_skip") if has_skip else None,
        ),
    )


def _hookpoint(folder: Path) -> Path:
    """The folder that is named after a module."""
    folder = folder.resolve()
    return folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder


def _d_sae(checkpoint: Checkpoint, config: dict[str, Any], d_in: int) -> int:
    if config.get("num_latents"):
        return checkpoint.count(config, "num_latents")
    return d_in * checkpoint.count(config, "expansion_factor")


def _encoder(checkpoint: Checkpoint, config: dict[str, Any]) -> str:
    activation = checkpoint.choice(config, "activation", ("topk", "groupmax"))
    return "abstopk" if activation == "topk" and config.get("signed") else activation


def _k(checkpoint: Checkpoint, config: dict[str, Any], encoder: str, d_sae: int) -> int:
    """Active features per token; for GroupMax the number of groups."""
    given = checkpoint.option("k") if encoder != "groupmax" else None
    k = checkpoint.count(config, "k") if given is None else int(given)
    if k > d_sae:
        raise checkpoint.error(f"k={k} is larger than num_latents={d_sae}")
    if encoder == "groupmax" and d_sae % k:
        raise checkpoint.error(f"num_latents={d_sae} cannot be divided into k={k} groups")
    return k


def _activation(encoder: str, source: TensorSource, k: int) -> Activation:
    b_enc = source.read("encoder.bias")
    if encoder == "groupmax":
        return groupmax.canonical(b_enc, k)
    return abstopk.canonical(b_enc, k) if encoder == "abstopk" else topk.canonical(b_enc, k)


def _model_name(checkpoint: Checkpoint, run: Path) -> str | None:
    """The model that the run's own configuration names, where there is one."""
    path = run / "config.json"
    model = checkpoint.config(str(path)).get("model") if path.is_file() else None
    return model if isinstance(model, str) else None
