"""mistral-sae: one file, a state dict, pickled as its training script saves it, or the same as safetensors.

Format: mistral-sae 0.1, `mistral_sae/sae.py`; published is one for layer 16 of Mistral 7B. Each token is centred and
divided by its standard deviation plus 1e-5 (Bessel's correction, as `token_norm` has it), then b_pre is subtracted.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_models.architectures import topk
from sae_models.checkpoint import PICKLES, Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import IDENTITY
from sae_models.sae import SAE, Weights

NAME = "mistral-sae"
LAYOUT = "a .safetensors or .pth file with w_enc, w_dec, b_enc, b_pre"
VERSIONS = "0.1"
ARCHITECTURES = ("topk",)

TENSORS = frozenset({"w_enc", "w_dec", "b_enc", "b_pre"})
UNREAD = "stats_last_nonzero"
_PUBLISHED_K = 128


def detect(checkpoint: Checkpoint) -> bool:
    """By its tensors; a pickle, which cannot be looked into here, by a name with `mistral` in it."""
    path = _weights(checkpoint)
    if path is None:
        return False
    if path.suffix in PICKLES:
        return "mistral" in path.name.lower()
    return path.suffix == ".safetensors" and checkpoint.tensors(path).names() >= TENSORS


def load(checkpoint: Checkpoint) -> SAE:
    path = _weights(checkpoint)
    assert path is not None
    layer = _layer(path)
    hook_points = checkpoint.hook_points(None if layer is None else f"blocks.{layer}.hook_resid_post")
    k = checkpoint.option("k")
    if k is None:
        raise checkpoint.error(
            f"the file does not say how many features are active per token; add ?k=N to the path ({_PUBLISHED_K} for "
            "the published one)"
        )
    source = checkpoint.tensors(path)
    checkpoint.refuse_unknown_tensors(source, TENSORS | {UNREAD})
    for name in ("b_pre", "b_enc"):
        if name not in source.names() or len(source.shape(name)) != 1:
            raise checkpoint.error(f"{name} is missing or no vector; found: {', '.join(sorted(source.names()))}")
    d_in, d_sae = source.shape("b_pre")[0], source.shape("b_enc")[0]
    if k > d_sae:
        raise checkpoint.error(f"k={k} is larger than the number of features, {d_sae}")
    shapes: dict[str, tuple[int, ...]] = {
        "w_enc": (d_in, d_sae),
        "w_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_pre": (d_in,),
    }
    sha256 = checkpoint.verified([], [(source, shapes)], [str(point) for point in hook_points])
    b_pre = source.read("b_pre").double()
    return SAE(
        name=path.stem,
        family=NAME,
        architecture="topk",
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points,
        token_norm="layer_norm",
        model_name=checkpoint.option("model"),
        skip_first=0,
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, "w_enc", 1, sha256),
            W_dec=FeatureMatrix(source, "w_dec", 0, sha256),
            b_dec=b_pre,
            activation=topk.canonical(source.read("b_enc"), k=int(k)),
            input_map=IDENTITY.then_subtract(b_pre),
        ),
    )


def _weights(checkpoint: Checkpoint) -> Path | None:
    """The named file, or the only one of a folder."""
    if checkpoint.path.is_file():
        return checkpoint.path
    files = [path for path in checkpoint.path.iterdir() if path.suffix in (".safetensors", *PICKLES)]
    return files[0] if len(files) == 1 else None


def _layer(path: Path) -> int | None:
    """The layer that the file's name gives, or its folder's, or that of the repository it was downloaded from."""
    folder = path.parent.resolve()
    repository = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    for name in (path.name, folder.name, repository):
        found = re.search(r"layer_?(\d+)", name)
        if found is not None:
            return int(found[1])
    return None
