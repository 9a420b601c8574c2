"""Gemma Scope: the published layout of `params.npz`, and its equations.

`python -m tests.conformance.gemma_scope OUT`. No library writes these; the equations are those of the technical report
(arXiv 2408.05147). SAELens' loaders for this family are asked for their answers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sae_lens.loading.pretrained_sae_loaders import (
    gemma_2_sae_huggingface_loader,
    gemma_2_transcoder_huggingface_loader,
)

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.saelens_answer import saelens_answer
from tests.conformance.weights import D_IN, D_SAE, EXACT_THRESHOLD, random_weights

FAMILY = "gemma_scope"
LAYOUT = "arXiv 2408.05147"


@dataclass(frozen=True)
class Case:
    """scale: what Gemma multiplies embeddings by, which SAEs of them were trained without."""

    name: str
    repository: str
    folder: str = "layer_3/width_16k/average_l0_71"
    scale: float = 1.0


CASES = (
    Case("res", "gemma-scope-2b-pt-res"),
    Case("mlp", "gemma-scope-9b-pt-mlp"),
    Case("att", "gemma-scope-2b-pt-att"),
    Case("it", "gemma-scope-9b-it-res"),
    Case("embedding", "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", scale=D_IN**0.5),
    Case("transcoder", "gemma-scope-2b-pt-transcoders"),
)


class GemmaScope(torch.nn.Module):
    """The tensors as stored; scale: of the activations, against what it was trained on."""

    def __init__(self, weights: dict[str, torch.Tensor], scale: float) -> None:
        super().__init__()
        self.scale = scale
        for name, value in weights.items():
            self.register_buffer(name, value)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pre_acts = x / self.scale @ self.W_enc + self.b_enc
        return torch.relu(pre_acts) * (pre_acts > self.threshold)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return (f @ self.W_dec + self.b_dec) * self.scale


def answer(sae: GemmaScope, x: torch.Tensor) -> Answer:
    activations = sae.encode(x)
    return activations, sae.decode(activations)


def write(out: Path, case: Case, seed: int) -> None:
    drawn = random_weights(seed)
    weights = {name: drawn[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    repository = out / case.name / case.repository
    (repository / case.folder).mkdir(parents=True)
    np.savez(repository / case.folder / "params.npz", **{name: value.numpy() for name, value in weights.items()})
    inputs = make_inputs(seed, weights["W_enc"], threshold=EXACT_THRESHOLD, subtracts_b_dec=False, scale=1 / case.scale)
    is_transcoder = "transcoders" in case.repository
    others, notes = saelens_answer(
        gemma_2_transcoder_huggingface_loader if is_transcoder else gemma_2_sae_huggingface_loader,
        repository,
        case.folder,
        inputs.x,
        overrides={"d_in": D_IN, "d_sae": D_SAE} | ({"d_out": D_IN} if is_transcoder else {}),
    )
    write_expected(
        out / case.name / "expected.safetensors",
        description={
            "family": FAMILY,
            "library": LAYOUT,
            "version": "layout",
            "class": "JumpReLU transcoder" if is_transcoder else "JumpReLU SAE",
            "case": case.name,
            "checkpoint": f"{case.repository}/{case.folder}",
        }
        | notes,
        model=GemmaScope(weights, case.scale),
        answer=answer,
        inputs=inputs,
        others=others,
    )


def main(out: Path) -> None:
    for seed, case in enumerate(CASES, start=600):
        write(out, case, seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
