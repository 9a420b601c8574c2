"""circuit-tracer: sets of per-layer transcoders and cross-layer transcoders.

`python -m tests.conformance.circuit_tracer OUT`. A folder has many layers: there is one `expected_layer_N.safetensors`
for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_transcoder_set,
)
from torch.nn import functional

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.weights import D_IN, D_SAE, EXACT_THRESHOLD, random_weights

FAMILY = "circuit_tracer"
K = 3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """activation: relu, jumprelu or topk. hooks: where a transcoder reads and writes, as config.yaml names them."""

    name: str
    activation: str
    layers: int = 2
    skip: bool = False
    hooks: tuple[str, str] = ("mlp.hook_in", "mlp.hook_out")


SETS = (
    Case("relu", "relu"),
    Case("relu_skip", "relu", skip=True),
    Case("jumprelu", "jumprelu", hooks=("hook_resid_mid", "hook_mlp_out")),
    Case("jumprelu_skip", "jumprelu", skip=True),
    Case("topk", "topk"),
)
CROSS_LAYER = (
    Case("cross_layer_relu", "relu", layers=3, hooks=("hook_resid_mid", "hook_mlp_out")),
    Case("cross_layer_jumprelu", "jumprelu", layers=3, hooks=("hook_resid_mid", "hook_mlp_out")),
)


def describe(case: Case, klass: type, layer: int) -> dict[str, str]:
    return {
        "family": FAMILY,
        "library": "circuit-tracer",
        "version": version("circuit-tracer"),
        "class": klass.__name__,
        "case": case.name,
        "checkpoint": "transcoders",
        "layer": str(layer),
    }


def layer_weights(case: Case, seed: int) -> list[dict[str, torch.Tensor]]:
    mean_bias = -1.0 if case.activation == "topk" else 0.0
    return [random_weights(seed + layer, mean_bias=mean_bias) for layer in range(case.layers)]


def write_config(folder: Path, case: Case, kind: str) -> None:
    folder.mkdir(parents=True)
    config = {
        "model_name": "Qwen/Qwen3-0.6B",
        "model_kind": kind,
        "feature_input_hook": case.hooks[0],
        "feature_output_hook": case.hooks[1],
        "scan": "some/transcoders",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def activation_function(case: Case, weights: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    if case.activation == "jumprelu":
        return JumpReLU(weights["threshold"].clone(), 0.1)
    return TopK(K) if case.activation == "topk" else functional.relu


def build_set(case: Case, seed: int) -> TranscoderSet:
    transcoders = {}
    for layer, weights in enumerate(layer_weights(case, seed)):
        transcoder = SingleLayerTranscoder(
            D_IN,
            D_SAE,
            activation_function(case, weights),
            layer,
            skip_connection=case.skip,
            device=CPU,
            dtype=torch.float32,
        )
        with torch.no_grad():
            for name, parameter in transcoder.named_parameters():
                if name != "activation_function.threshold":
                    parameter.copy_(weights[name].T if name == "W_enc" else weights[name])
        transcoders[layer] = transcoder
    return TranscoderSet(transcoders, *case.hooks)


def answer(transcoder: SingleLayerTranscoder, x: torch.Tensor) -> Answer:
    # forward rather than decode: it is what adds a skip connection.
    return transcoder.encode(x), transcoder(x)


def write_set(out: Path, case: Case, seed: int) -> None:
    folder = out / case.name / "transcoders"
    write_config(folder, case, "transcoder_set")
    built = build_set(case, seed)
    built.to_safetensors(str(folder))
    loaded = load_transcoder_set(
        {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(case.layers)},
        "some/transcoders",
        *case.hooks,
        device=CPU,
        lazy_encoder=False,
        lazy_decoder=False,
    )
    topk = case.activation == "topk"
    for layer, weights in enumerate(layer_weights(case, seed)):
        inputs = make_inputs(
            seed + layer,
            weights["W_enc"],
            threshold=EXACT_THRESHOLD if case.activation == "jumprelu" else 0.0,
            subtracts_b_dec=False,
        )
        description, others = describe(case, SingleLayerTranscoder, layer), {}
        if topk:
            # Nothing that is saved says TopK, and the library's own loader takes it for ReLU.
            with torch.no_grad():
                as_relu = answer(loaded[layer], inputs.x)
            others = dict(zip(("loaded_activations", "loaded_reconstruction"), as_relu, strict=True))
            description |= {"k": str(K), "note": "neither file names k; its TopK has no ReLU and keeps negative values"}
        write_expected(
            out / case.name / f"expected_layer_{layer}.safetensors",
            description=description,
            model=(built if topk else loaded)[layer],
            answer=answer,
            inputs=inputs,
            ties=topk,
            others=others,
        )


def build_cross_layer(case: Case, seed: int) -> CrossLayerTranscoder:
    clt = CrossLayerTranscoder(
        case.layers,
        D_SAE,
        D_IN,
        activation_function="jump_relu" if case.activation == "jumprelu" else "relu",
        lazy_decoder=False,
        device=CPU,
        dtype=torch.float32,
    )
    with torch.no_grad():
        for layer, weights in enumerate(layer_weights(case, seed)):
            clt.W_enc[layer] = weights["W_enc"].T
            clt.b_enc[layer] = weights["b_enc"]
            clt.b_dec[layer] = weights["b_dec"]
            for target in range(layer, case.layers):
                # Every target has a decoder of its own; the one of its own layer is the one of `random_weights`.
                decoder = (
                    weights["W_dec"] if target == layer else random_weights(seed + 50 + 10 * layer + target)["W_dec"]
                )
                clt.W_dec[layer][:, target - layer] = decoder
            if case.activation == "jumprelu":
                clt.activation_function.threshold[layer, 0] = weights["threshold"]
    return clt


def write_cross_layer(out: Path, case: Case, seed: int) -> None:
    folder = out / case.name / "transcoders"
    write_config(folder, case, "cross_layer_transcoder")
    build_cross_layer(case, seed).to_safetensors(str(folder))
    for layer, weights in enumerate(layer_weights(case, seed)):

        def answer_own_layer(clt: CrossLayerTranscoder, x: torch.Tensor, layer: int = layer) -> Answer:
            """Activations of the layer, and what they alone write to its own output."""
            features = clt.encode(x.expand(clt.n_layers, *x.shape))
            alone = torch.zeros_like(features)
            alone[layer] = features[layer]
            return features[layer], clt.decode(alone)[layer]

        write_expected(
            out / case.name / f"expected_layer_{layer}.safetensors",
            description=describe(case, CrossLayerTranscoder, layer),
            model=load_clt(str(folder), *case.hooks, device=CPU, dtype=torch.float32, lazy_decoder=False),
            answer=answer_own_layer,
            inputs=make_inputs(
                seed + layer,
                weights["W_enc"],
                threshold=EXACT_THRESHOLD if case.activation == "jumprelu" else 0.0,
                subtracts_b_dec=False,
            ),
        )


def main(out: Path) -> None:
    for seed, case in enumerate(SETS):
        write_set(out, case, 300 + 10 * seed)
    for seed, case in enumerate(CROSS_LAYER):
        write_cross_layer(out, case, 400 + 100 * seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
