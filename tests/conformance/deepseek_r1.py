"""qresearch: ReLU SAEs of DeepSeek-R1 distillations, bfloat16, as the notebook of github.com/qrsch/SAE defines them.

`python -m tests.conformance.deepseek_r1 OUT`. There is no library. The notebook reads the input of the named decoder
layer; SAELens, whose loader is asked for its answer, calls the place that layer's output.
"""

from __future__ import annotations

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

FAMILY = "deepseek_r1"


class SparseAutoencoder(nn.Module):
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.encoder = nn.Linear(D_IN, D_SAE)
        self.decoder = nn.Linear(D_SAE, D_IN)
        self.load_state_dict(
            {
                "encoder.weight": weights["W_enc"].T,
                "encoder.bias": weights["b_enc"],
                "decoder.weight": weights["W_dec"].T,
                "decoder.bias": weights["b_dec"],
            }
        )


def answer(sae: SparseAutoencoder, x: torch.Tensor) -> Answer:
    activations = torch.relu(sae.encoder(x))
    return activations, sae.decoder(activations)


def write(out: Path, case: str, release: str, seed: int) -> None:
    file = out / case / f"{release}.pt"
    file.parent.mkdir(parents=True)
    weights = {name: tensor.bfloat16().float() for name, tensor in random_weights(seed).items()}
    sae = SparseAutoencoder(weights)
    torch.save({name: tensor.bfloat16() for name, tensor in sae.state_dict().items()}, file)
    inputs = make_inputs(seed, weights["W_enc"], subtracts_b_dec=False)
    theirs, notes = saelens_answer(
        pretrained_sae_loaders.deepseek_r1_sae_huggingface_loader,
        f"qresearch/{release}",
        file,
        D_IN,
        D_SAE,
        inputs.x,
    )
    write_expected(
        out / case / "expected.safetensors",
        description={
            "family": FAMILY,
            "library": "none: github.com/qrsch/SAE, SAE.ipynb",
            "version": version("torch"),
            "class": "SparseAutoencoder",
            "case": case,
            "checkpoint": file.name,
            **notes,
        },
        model=sae,
        answer=answer,
        inputs=inputs,
        others=theirs,
    )


def main(out: Path) -> None:
    write(out, "llama_8b", "DeepSeek-R1-Distill-Llama-8B-SAE-l19", 620)
    write(out, "llama_70b", "DeepSeek-R1-Distill-Llama-70B-SAE-l48", 621)
    write(out, "llama_1b", "Llama-3.2-1B-Instruct-SAE-l9", 622)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
