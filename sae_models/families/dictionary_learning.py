"""dictionary_learning: `ae.pt`, a pickled state dict, beside the `config.json` of its trainer.

Format: `dictionary_learning/dictionary.py` and `trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py` of version 0.1;
SwitchAutoEncoder: `trainers/switch.py` of its fork, amudide/switch_sae. So saved are the SAEBench suites and
andyrdt's SAEs for Llama 3.1, Qwen 2.5 and gpt-oss. Norms of training are folded before it saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sae_models.activation import Activation
from sae_models.architectures import batchtopk, gated, jumprelu, matryoshka, relu, switch, topk
from sae_models.checkpoint import Checkpoint
from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import IDENTITY
from sae_models.hook_points import HookPoint
from sae_models.sae import SAE, Weights
from sae_models.tensor_source import TensorSource

NAME = "dictionary_learning"
LAYOUT = "ae.pt, config.json"
VERSIONS = "0.1"

CONFIG, WEIGHTS = "config.json", "ae.pt"


@dataclass(frozen=True)
class _Class:
    """A class of dictionary: its architecture and the names of its tensors.

    rows: W_enc is stored [d_sae, d_in], else [d_in, d_sae]. W_dec is stored the other way around, but for Switch.
    unread: tensors that the maths at inference has no use for.
    """

    architecture: str
    b_dec: str
    W_enc: str = "encoder.weight"
    W_dec: str = "decoder.weight"
    vectors: tuple[str, ...] = ("encoder.bias",)
    rows: bool = True
    subtracts_b_dec: bool = True
    unread: tuple[str, ...] = ()


_CLASSES = {
    "AutoEncoder": _Class("relu", "bias"),
    "AutoEncoderNew": _Class("relu", "decoder.bias", subtracts_b_dec=False),
    "GatedAutoEncoder": _Class("gated", "decoder_bias", vectors=("gate_bias", "r_mag", "mag_bias")),
    "JumpReluAutoEncoder": _Class(
        "jumprelu", "b_dec", "W_enc", "W_dec", ("b_enc", "threshold"), rows=False, subtracts_b_dec=False
    ),
    "AutoEncoderTopK": _Class("topk", "b_dec", unread=("k", "threshold")),
    "BatchTopKSAE": _Class("batchtopk", "b_dec", unread=("k", "threshold")),
    "MatryoshkaBatchTopKSAE": _Class(
        "matryoshka", "b_dec", "W_enc", "W_dec", ("b_enc",), rows=False, unread=("k", "threshold", "group_sizes")
    ),
    "SwitchAutoEncoder": _Class("switch", "b_dec", W_dec="decoder", vectors=()),
}
ARCHITECTURES = tuple(dict.fromkeys(kind.architecture for kind in _CLASSES.values()))

STEEP = 2.0**40
"""Softmax of scores times this is 1 for the largest and 0 for the others, down to the rounding of float32 scores."""

_ANDYRDT_MODELS = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "openai/gpt-oss-20b")
_ANDYRDT_D_SAE = 131_072


def detect(checkpoint: Checkpoint) -> bool:
    return checkpoint.has(CONFIG, WEIGHTS)


def load(checkpoint: Checkpoint) -> SAE:
    config = checkpoint.config(CONFIG)
    trainer, buffer = config.get("trainer"), config.get("buffer") or {}
    if not isinstance(trainer, dict) or not isinstance(buffer, dict):
        raise checkpoint.error(f"{CONFIG} has no object `trainer` of dictionary_learning, or a `buffer` that is none")
    name = trainer.get("dict_class")
    if not isinstance(name, str) or name not in _CLASSES:
        raise checkpoint.error(f"dict_class={name!r} is not supported; supported: {', '.join(_CLASSES)}")
    kind = _CLASSES[name]
    d_in, d_sae = checkpoint.count(trainer, "activation_dim"), checkpoint.count(trainer, "dict_size")
    folder = checkpoint.folder.resolve()
    hook_points = _hook_points(checkpoint, trainer, buffer, folder.parent.name)
    source = checkpoint.tensors(checkpoint.file(WEIGHTS))
    shapes: dict[str, tuple[int, ...]] = {
        kind.W_enc: (d_sae, d_in) if kind.rows else (d_in, d_sae),
        kind.W_dec: (d_in, d_sae) if kind.rows and kind.architecture != "switch" else (d_sae, d_in),
        kind.b_dec: (d_in,),
        **dict.fromkeys(kind.vectors, (d_sae,)),
    }
    if kind.architecture == "switch":
        experts = checkpoint.count(trainer, "experts")
        shapes |= {"router.weight": (experts, d_in), "b_router": (d_in,)}
    if kind.architecture in ("batchtopk", "matryoshka") and "threshold" in source.names():
        shapes["threshold"] = ()
    checkpoint.refuse_unknown_tensors(source, [*shapes, *kind.unread])
    sha256 = checkpoint.verified([CONFIG], [(source, shapes)], [str(point) for point in hook_points])
    b_dec = source.read(kind.b_dec).double()
    return SAE(
        name=f"{folder.parent.name}/{folder.name}",
        family=NAME,
        architecture=kind.architecture,
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        hook_points=hook_points,
        hook_points_out=hook_points,
        token_norm="none",
        model_name=checkpoint.option("model") or trainer.get("lm_name"),
        skip_first=_skip_first(trainer),
        folder=checkpoint.folder,
        sha256=sha256,
        weights=Weights(
            W_enc=FeatureMatrix(source, kind.W_enc, 0 if kind.rows else 1, sha256),
            W_dec=FeatureMatrix(source, kind.W_dec, 0 if shapes[kind.W_dec] == (d_sae, d_in) else 1, sha256),
            b_dec=b_dec,
            activation=_activation(checkpoint, kind, trainer, source, d_sae),
            input_map=IDENTITY.then_subtract(b_dec) if kind.subtracts_b_dec else IDENTITY,
            router=_router(source, bool(trainer.get("heaviside"))) if kind.architecture == "switch" else None,
        ),
    )


def _hook_points(
    checkpoint: Checkpoint, trainer: Mapping[str, Any], buffer: Mapping[str, Any], parent: str
) -> tuple[HookPoint, ...]:
    """Where it reads: a trainer names its submodule as its user did, and the buffer which end of it was read.

    A name such as `resid_post_layer_3` says what comes out; with that, `io: in` says two things at once, and the place
    has to be given.
    """
    named = trainer.get("submodule_name")
    if not named and parent.endswith(f"_layer_{trainer.get('layer')}"):
        named = parent
    io = buffer.get("io", "out")
    if io not in ("in", "out"):
        raise checkpoint.error(f"buffer.io={io!r} is not supported; supported: in, out")
    if not named or checkpoint.option("hook") is not None:
        return checkpoint.hook_points(None)
    place = f"{named}.input" if io == "in" else str(named)
    if _layer(place) is None or trainer.get("layer") not in (None, _layer(str(named))):
        raise checkpoint.error(
            f"submodule_name={named!r} with layer={trainer.get('layer')!r} and buffer.io={io!r} does not say where it "
            "reads; add ?hook=blocks.<layer>.hook_resid_post, or wherever it does, to the path"
        )
    return checkpoint.hook_points(place)


def _layer(place: str) -> int | None:
    """The layer of a hook point; None where the name is that of none."""
    try:
        return HookPoint.parse(place).layer
    except ValueError:
        return None


def _activation(
    checkpoint: Checkpoint, kind: _Class, trainer: Mapping[str, Any], source: TensorSource, d_sae: int
) -> Activation:
    vectors = {name: source.read(name) for name in kind.vectors}
    if kind.architecture == "relu":
        return relu.canonical(vectors["encoder.bias"])
    if kind.architecture == "gated":
        return gated.canonical(vectors["gate_bias"], vectors["r_mag"], vectors["mag_bias"])
    if kind.architecture == "jumprelu":
        return jumprelu.canonical(vectors["b_enc"], vectors["threshold"])
    if kind.architecture == "topk":
        return topk.canonical(vectors["encoder.bias"], k=_k(checkpoint, trainer, source, d_sae))
    if kind.architecture == "batchtopk":
        return batchtopk.canonical(vectors["encoder.bias"], _threshold(checkpoint, source))
    if kind.architecture == "matryoshka":
        sizes = source.read("group_sizes").flatten().tolist() if "group_sizes" in source.names() else [d_sae]
        if sum(sizes) != d_sae:
            raise checkpoint.error(f"group_sizes={sizes} do not add up to dict_size={d_sae}")
        return matryoshka.canonical(vectors["b_enc"], _threshold(checkpoint, source), sizes, len(sizes))
    experts = checkpoint.count(trainer, "experts")
    if d_sae % experts:
        raise checkpoint.error(f"dict_size={d_sae} cannot be divided among {experts} experts")
    # It keeps the k largest of all features, of which only the expert's are not zero.
    k = min(_k(checkpoint, trainer, source, d_sae), d_sae // experts)
    return switch.canonical(torch.zeros(d_sae, dtype=torch.float64), k=k, experts=experts)


def _k(checkpoint: Checkpoint, trainer: Mapping[str, Any], source: TensorSource, d_sae: int) -> int:
    """Active features per token."""
    given = checkpoint.option("k")
    k = checkpoint.count(trainer, "k") if given is None else int(given)
    stored = source.read("k").flatten().tolist() if "k" in source.names() else [k]
    if given is None and stored != [k]:
        raise checkpoint.error(f"k={k} in {CONFIG} and k={stored[0]} in {WEIGHTS}; add ?k=N to the path")
    if k > d_sae:
        raise checkpoint.error(f"k={k} is larger than dict_size={d_sae}")
    return k


def _threshold(checkpoint: Checkpoint, source: TensorSource) -> float:
    """What activations have to exceed; below zero it was never set."""
    found = float(source.read("threshold")) if "threshold" in source.names() else None
    if found is not None and found >= 0:
        return found
    given = checkpoint.option("threshold")
    if given is None:
        raise checkpoint.error(
            f"threshold={found}: training ended before it was calibrated; add ?threshold=N to the path, the mean of "
            "the smallest activation that BatchTopK keeps in a batch"
        )
    return float(given)


def _router(source: TensorSource, heaviside: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(W [d_in, experts], b [experts]). heaviside: the expert's activations are not multiplied by its probability."""
    W = source.read("router.weight").double().T * (STEEP if heaviside else 1.0)
    return W, -source.read("b_router").double() @ W


def _skip_first(trainer: Mapping[str, Any]) -> int:
    """Tokens that it knows nothing of.

    andyrdt's SAEs were trained without a text's first tokens and without those of more than ten times the median norm:
    attention sinks, of which the first token is always one.
    """
    andyrdt = (
        trainer.get("dict_class") == "BatchTopKSAE"
        and trainer.get("dict_size") == _ANDYRDT_D_SAE
        and trainer.get("lm_name") in _ANDYRDT_MODELS
    )
    return 1 if andyrdt else 0
