"""What the two formats of OpenMOSS's library have in common: where weights lie, and what is read of norms and k."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_models.checkpoint import Checkpoint
from sae_models.tensor_source import TensorSource

_STEMS = ("sae_weights", "checkpoints/pruned", "checkpoints/final")
_ENDINGS = (".safetensors", ".pt", ".dcp")

NORMS_OF_INPUTS = ("token-wise", "batch-wise")

DOCUMENTED = "{sae_weights, checkpoints/pruned, checkpoints/final}.safetensors"


def folder(checkpoint: Checkpoint) -> Path:
    """The folder of the configuration, whether it or a file of weights in it was named."""
    return checkpoint.folder.parent if checkpoint.folder.name == "checkpoints" else checkpoint.folder


def weights_path(checkpoint: Checkpoint) -> Path | None:
    """The file of weights: the named one, or the first that the library itself would open."""
    if checkpoint.path.is_file() and checkpoint.path.suffix in _ENDINGS:
        return checkpoint.path
    found = (folder(checkpoint) / f"{stem}{ending}" for stem in _STEMS for ending in _ENDINGS)
    return next((path for path in found if path.exists()), None)


def opened(checkpoint: Checkpoint) -> tuple[TensorSource, str]:
    """The tensors, and what their names begin with: `sae.` in its pickles, which nest them."""
    path = weights_path(checkpoint)
    assert path is not None
    if path.suffix == ".dcp":
        raise checkpoint.error(
            f"{path.name} is a checkpoint of torch.distributed, whose index is a pickle; load it with OpenMOSS's "
            f"library on one device and save it again with save_pretrained, which writes safetensors"
        )
    source = checkpoint.tensors(path)
    return source, "sae." if any(name.startswith("sae.") for name in source.names()) else ""


def architecture(act_fn: str, is_transcoder: bool) -> str:
    if not is_transcoder:
        return act_fn
    return "transcoder" if act_fn == "relu" else f"{act_fn}_transcoder"


def flag(checkpoint: Checkpoint, config: Mapping[str, Any], key: str, default: bool | None = None) -> bool:
    """A boolean of the configuration; the library writes all of them. default: of those that a version had not yet."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise checkpoint.error(f"{key} must be true or false, got {value!r}")
    return value


def refuse_glu(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    if flag(checkpoint, config, "use_glu_encoder", default=False):
        raise checkpoint.error(
            "use_glu_encoder=true is not supported: an activation then is the product of two rows' readings, and an "
            "edit row has one"
        )


def mean_norm(checkpoint: Checkpoint, value: Any, option: str) -> float:
    """The mean norm of the activations at a hook point, from the checkpoint, else from an option."""
    if value is None:
        value = checkpoint.option(option)
    if value is None:
        read = "reads" if option == "norm" else "writes"
        raise checkpoint.error(
            f"norm_activation='dataset-wise', and dataset_average_activation_norm of what it {read} is missing; add "
            f"?{option}=N to the path, the mean L2 norm of those activations"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise checkpoint.error(f"dataset_average_activation_norm must be a number over 0, got {value!r}")
    return float(value)


def refuse_norm(checkpoint: Checkpoint, norm: str, is_transcoder: bool) -> None:
    """Raise SAEFormatError for norms of inputs that cannot be known while a model runs."""
    if norm == "batch-wise":
        raise checkpoint.error(
            "norm_activation='batch-wise' is not supported: what a token is divided by depends on the others of its "
            "batch"
        )
    if norm == "token-wise" and is_transcoder:
        raise checkpoint.error(
            "norm_activation='token-wise' is not supported for transcoders: what they write is to be multiplied by the "
            "norm of the output that they stand for"
        )


def top_k(checkpoint: Checkpoint, config: Mapping[str, Any], d_sae: int) -> int:
    """Active features per token of a TopK SAE."""
    given = checkpoint.option("k")
    k = checkpoint.count(config, "top_k") if given is None else int(given)
    if k > d_sae:
        raise checkpoint.error(f"k={k} is larger than d_sae={d_sae}")
    return k
