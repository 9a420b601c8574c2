"""Qwen-Scope: `layer<n>.sae.pt` as its model cards describe it, and the cards' encoder.

`python -m tests.conformance.qwen_scope OUT`. There is no library; the cards of `Qwen/SAE-Res-*` give names, shapes and
a function. That function keeps the k largest pre-activations with their signs; SAELens, whose loader is asked for its
answer, sets those below zero to zero, and so does `expected.safetensors`. The card's own answer is beside it.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens.loading import pretrained_sae_loaders
from torch import nn

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.saelens_loader import saelens_answer
from tests.conformance.weights import D_IN, D_SAE, random_weights

FAMILY = "qwen_scope"
RELEASE = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_{k}"
LAYER = 7


class PublishedSAE(nn.Module):
    """W_enc [d_sae, d_in] and W_dec [d_in, d_sae]."""

    def __init__(self, weights: dict[str, torch.Tensor], k: int) -> None:
        super().__init__()
        self.k = k
        self.W_enc = nn.Parameter(weights["W_enc"].T.contiguous())
        self.W_dec = nn.Parameter(weights["W_dec"].T.contiguous())
        self.b_enc = nn.Parameter(weights["b_enc"])
        self.b_dec = nn.Parameter(weights["b_dec"])

    def card(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [n, d_sae] as the model card computes them."""
        top = (x @ self.W_enc.T + self.b_enc).topk(self.k, dim=-1)
        return x.new_zeros(len(x), len(self.b_enc)).scatter(-1, top.indices, top.values)


def answer(sae: PublishedSAE, x: torch.Tensor) -> Answer:
    activations = torch.relu(sae.card(x))
    return activations, activations @ sae.W_dec.T + sae.b_dec


def write(out: Path, case: str, seed: int, *, k: int, mean_bias: float) -> None:
    release = RELEASE.format(k=k)
    checkpoint = out / case / release / f"layer{LAYER}.sae.pt"
    checkpoint.parent.mkdir(parents=True)
    sae = PublishedSAE(random_weights(seed, mean_bias=mean_bias), k)
    torch.save({name: parameter.data for name, parameter in sae.named_parameters()}, checkpoint)
    inputs = make_inputs(seed, sae.W_enc.data.T, subtracts_b_dec=False)
    others: dict[str, Any] = {"card_activations": sae.card(inputs.x).detach()}
    theirs, notes = saelens_answer(
        pretrained_sae_loaders.qwen_scope_sae_huggingface_loader, f"Qwen/{release}", checkpoint, D_IN, D_SAE, inputs.x
    )
    write_expected(
        out / case / "expected.safetensors",
        description={
            "family": FAMILY,
            "library": "none: model cards of Qwen/SAE-Res-*",
            "version": version("torch"),
            "class": "PublishedSAE",
            "case": case,
            "checkpoint": checkpoint.relative_to(out / case).as_posix(),
            "k": str(k),
            **notes,
        },
        model=sae,
        answer=answer,
        inputs=inputs,
        ties=True,
        others=others | theirs,
    )


def main(out: Path) -> None:
    write(out, "l0_3", 600, k=3, mean_bias=0.0)
    write(out, "l0_3_few_active", 601, k=3, mean_bias=-1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
