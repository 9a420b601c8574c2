"""Qwen-Scope: `layer<n>.sae.pt` in a folder named `SAE-Res-<model>-W<width>K-L0_<k>`.

Format: the model cards of `Qwen/SAE-Res-*` (arXiv 2605.11887). Both matrices are named as in SAELens and stored the
other way around. Only the folder says k. The cards' example keeps the k largest pre-activations as they are; here, as
in SAELens, a kept one below zero is zero, which differs only where a token has fewer than k above it.
"""

from __future__ import annotations

import re

from sae_models.architectures import topk
from sae_models.checkpoint import Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.sae import SAE, Weights

NAME = "Qwen-Scope"
LAYOUT = "SAE-Res-<model>-W<width>K-L0_<k>/layer<n>.sae.pt"
VERSIONS = "Qwen3, Qwen3.5"
ARCHITECTURES = (topk.NAME,)

_FILE = r"layer(\d+)\.sae\.pt"
_RELEASE = re.compile(r"SAE-Res-(?P<model>[A-Za-z0-9.-]+)-W\d+K-L0_(?P<k>\d+)")


def detect(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.files(_FILE))


def load(checkpoint: Checkpoint) -> SAE:
    path = checkpoint.only_file(_FILE)
    layer = int(re.fullmatch(_FILE, path.name)[1])  # type: ignore[index]
    source = checkpoint.tensors(path)
    d_sae, d_in = checkpoint.length(source, "b_enc"), checkpoint.length(source, "b_dec")
    releases = list(_RELEASE.finditer("/".join(checkpoint.parts)))
    release = releases[-1] if releases else None
    k = checkpoint.option("k") or (release and int(release["k"]))
    if k is None:
        raise checkpoint.error(
            "k is only in the name of Qwen-Scope's folders, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50, and this one is "
            "named otherwise; add ?k=50 to the path"
        )
    if k > d_sae:
        raise checkpoint.error(f"k={k} is larger than d_sae={d_sae}")
    shapes = {"W_enc": (d_sae, d_in), "W_dec": (d_in, d_sae), "b_enc": (d_sae,), "b_dec": (d_in,)}
    checkpoint.refuse_unknown_tensors(source, shapes)
    sha256 = checkpoint.verified([], [(source, shapes)], [f"layer {layer}", f"k {k}"])
    hook_points = checkpoint.hook_points(f"model.layers.{layer}.output")
    return SAE(
        name=f"{release[0]}/layer{layer}" if release else f"layer{layer}",
        family=NAME,
        architecture=topk.NAME,
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points,
        token_norm="none",
        model_name=checkpoint.option("model") or (f"Qwen/{release['model']}" if release else None),
        skip_first=0,
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, "W_enc", 0, sha256),
            W_dec=FeatureMatrix(source, "W_dec", 1, sha256),
            b_dec=source.read("b_dec").double(),
            activation=topk.canonical(source.read("b_enc"), k),
        ),
    )
