"""Goodfire: the ReLU SAEs of Llama 3 and the tied BatchTopK SAEs of DeepSeek-R1, as their example code defines them.

`python -m tests.conformance.goodfire OUT`. There is no library to install: the model cards of
`Goodfire/Llama-3.1-8B-Instruct-SAE-l19` and `-3.3-70B-Instruct-SAE-l50` and `sae.py` of github.com/goodfire-ai/
r1-interpretability give names, shapes and equations. SAELens' loader is asked for its answer for the first two.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens.loading import pretrained_sae_loaders
from torch import nn

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.saelens_loader import saelens_answer
from tests.conformance.weights import D_IN, D_SAE, random_weights

FAMILY = "goodfire"
K = 3


class LinearSAE(nn.Module):
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.encoder_linear = nn.Linear(D_IN, D_SAE)
        self.decoder_linear = nn.Linear(D_SAE, D_IN)
        self.load_state_dict(
            {
                "encoder_linear.weight": weights["W_enc"].T,
                "encoder_linear.bias": weights["b_enc"],
                "decoder_linear.weight": weights["W_dec"].T,
                "decoder_linear.bias": weights["b_dec"],
            }
        )


def linear_answer(sae: LinearSAE, x: torch.Tensor) -> Answer:
    activations = torch.relu(sae.encoder_linear(x))
    return activations, sae.decoder_linear(activations)


class TiedSAE(nn.Module):
    """W [d_in, d_sae], in both directions."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.W = nn.Parameter(weights["W_enc"])
        self.b_enc = nn.Parameter(weights["b_enc"])
        self.b_dec = nn.Parameter(weights["b_dec"])

    def batch(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [n, d_sae]: the K n largest of the whole batch, as `encode` of the release takes them."""
        acts = torch.relu(x @ self.W + self.b_enc).flatten()
        top = acts.topk(K * len(x))
        return torch.zeros_like(acts).scatter(-1, top.indices, top.values).reshape(len(x), -1)


def tied_answer(sae: TiedSAE, x: torch.Tensor) -> Answer:
    """Each token by itself."""
    activations = torch.cat([sae.batch(token) for token in x.split(1)])
    return activations, activations @ sae.W.T + sae.b_dec


def describe(case: str, file: str, model: nn.Module) -> dict[str, str]:
    return {
        "family": FAMILY,
        "library": "none: Goodfire's model cards and github.com/goodfire-ai/r1-interpretability",
        "version": version("torch"),
        "class": type(model).__name__,
        "case": case,
        "checkpoint": file,
    }


def write_linear(out: Path, case: str, release: str, suffix: str, seed: int) -> None:
    file = out / case / f"{release}{suffix}"
    file.parent.mkdir(parents=True)
    weights = random_weights(seed)
    sae = LinearSAE(weights)
    torch.save(sae.state_dict(), file)
    inputs = make_inputs(seed, weights["W_enc"], subtracts_b_dec=False)
    theirs, notes = saelens_answer(
        pretrained_sae_loaders.get_goodfire_huggingface_loader, f"Goodfire/{release}", file, D_IN, D_SAE, inputs.x
    )
    write_expected(
        out / case / "expected.safetensors",
        description=describe(case, file.name, sae) | notes,
        model=sae,
        answer=linear_answer,
        inputs=inputs,
        others=theirs,
    )


def write_tied(out: Path, case: str, seed: int) -> None:
    folder = out / case / case.removeprefix("r1_")
    folder.mkdir(parents=True)
    weights = random_weights(seed)
    sae = TiedSAE(weights)
    torch.save(sae.state_dict(), folder / "DeepSeek-R1-SAE-l37.pt")
    (folder / "config.json").write_text(json.dumps({"d_in": D_IN, "expansion_factor": D_SAE // D_IN, "k": K}))
    inputs = make_inputs(seed, weights["W_enc"], subtracts_b_dec=False)
    write_expected(
        out / case / "expected.safetensors",
        description=describe(case, f"{folder.name}/DeepSeek-R1-SAE-l37.pt", sae) | {"k": str(K)},
        model=sae,
        answer=tied_answer,
        inputs=inputs,
        others={"batch_activations": sae.batch(inputs.x).detach()},
        ties=True,
    )


def main(out: Path) -> None:
    write_linear(out, "llama_8b", "Llama-3.1-8B-Instruct-SAE-l19", ".pth", 610)
    write_linear(out, "llama_70b", "Llama-3.3-70B-Instruct-SAE-l50", ".pt", 611)
    write_tied(out, "r1_math", 612)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
