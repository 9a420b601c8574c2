"""Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147): JumpReLU SAEs and transcoders of Gemma 2, in `params.npz`.

There is no configuration. The repository's name says the model and the place, the folders under it the layer:
`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz`. Both are read from the path, as published or as in
a Hugging Face cache; what the path does not hold, options have to say.

Tensors: `W_enc` [d, d_sae], `W_dec` [d_sae, d], `b_enc`, `b_dec`, `threshold`. b_dec is not subtracted from the input.
Attention SAEs read all heads' z in one row; transcoders read the normalised stream before the norm's weights.
SAEs of the folder `embedding` were trained on embeddings before Gemma multiplies them by sqrt(d): the input is divided
by it, the whole reconstruction multiplied. (SAELens 6.54 scales `W_dec` so, and leaves `b_dec` as it is.)
"""

from __future__ import annotations

import re

from sae_models.architectures import jumprelu
from sae_models.checkpoint import Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import IDENTITY, scaled
from sae_models.sae import SAE, Weights
from sae_models.tensor_source import vector_length

NAME = "Gemma Scope"
LAYOUT = "params.npz"
VERSIONS = "Gemma 2: 2b, 9b, 27b; pt, it; res, mlp, att, transcoders"
ARCHITECTURES = ("jumprelu", "jumprelu_transcoder")

PARAMS = "params.npz"

_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)(?![a-z])")
_LAYER = re.compile(r"layer_(\d+)")
_PLACES: dict[str, tuple[str, str]] = {
    "res": ("blocks.{}.hook_resid_post", "blocks.{}.hook_resid_post"),
    "mlp": ("blocks.{}.hook_mlp_out", "blocks.{}.hook_mlp_out"),
    "att": ("blocks.{}.attn.hook_z", "blocks.{}.attn.hook_z"),
    "transcoders": ("blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"),
}
"""Where each kind of repository reads and writes."""


def detect(checkpoint: Checkpoint) -> bool:
    return checkpoint.path.suffix == ".npz" if checkpoint.path.is_file() else checkpoint.has(PARAMS)


def load(checkpoint: Checkpoint) -> SAE:
    source = checkpoint.tensors(checkpoint.path if checkpoint.path.is_file() else checkpoint.file(PARAMS))
    d, d_sae = vector_length(source, "b_dec"), vector_length(source, "b_enc")
    shapes = {"W_enc": (d, d_sae), "W_dec": (d_sae, d), "b_enc": (d_sae,), "b_dec": (d,), "threshold": (d_sae,)}
    model, kind, hook, hook_out = _named(checkpoint.parts)
    hook_points = checkpoint.hook_points(hook)
    is_transcoder = (
        kind == "transcoders"
        or checkpoint.option("hook_out") is not None
        or any(point.kind in ("ln2_normalized", "mlp_in") for point in hook_points)
    )
    hook_points_out = checkpoint.hook_points_out(hook_out) if is_transcoder else hook_points
    checkpoint.refuse_unknown_tensors(source, shapes)
    places = [str(point) for point in (*hook_points, *hook_points_out)]
    sha256 = checkpoint.verified([], [(source, shapes)], places)
    scale = d**0.5 if all(point.kind == "embed" for point in hook_points) else 1.0
    return SAE(
        name=checkpoint.folder.name,
        family=NAME,
        architecture="jumprelu_transcoder" if is_transcoder else "jumprelu",
        d_in=d,
        d_out=d,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points_out,
        token_norm="none",
        model_name=checkpoint.option("model") or model,
        skip_first=0,
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, "W_enc", 1, sha256),
            W_dec=FeatureMatrix(source, "W_dec", 0, sha256),
            b_dec=source.read("b_dec").double(),
            activation=jumprelu.canonical(source.read("b_enc"), source.read("threshold")),
            input_map=scaled(1 / scale) if scale != 1 else IDENTITY,
            output_map=scaled(scale) if scale != 1 else IDENTITY,
        ),
    )


def _named(parts: tuple[str, ...]) -> tuple[str | None, str | None, str | None, str | None]:
    """(model, kind of repository, where it reads, where it writes) as far as the names on the path say so."""
    repository = next((match for part in reversed(parts) if (match := _REPOSITORY.search(part))), None)
    if repository is None:
        return None, None, None, None
    size, tuned, kind = repository.groups()
    model = f"google/gemma-2-{size}" + ("-it" if tuned == "it" else "")
    layer = next((match[1] for part in reversed(parts) if (match := _LAYER.fullmatch(part))), None)
    if layer is not None:
        reads, writes = _PLACES[kind]
        return model, kind, reads.format(layer), writes.format(layer)
    if "embedding" in parts:
        return model, kind, "hook_embed", "hook_embed"
    return model, kind, None, None
