"""mistral-sae: its SparseAutoencoder, TopK on layer-normalised activations of Mistral 7B.

`python -m tests.conformance.mistral_sae OUT`. Its training script saves the state dict with `torch.save`; the same
tensors are written as safetensors too, as converted releases have them. Neither says k or the layer.
"""

from __future__ import annotations

import contextlib
import io
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from mistral_sae.sae import SparseAutoencoder
from safetensors.torch import save_file

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.weights import D_IN, D_SAE, random_weights

FAMILY = "mistral_sae"
K = 3
LAYER = 16
"""The layer that the published one was trained on."""

TENSORS = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_pre": "b_dec"}


def answer(sae: SparseAutoencoder, x: torch.Tensor) -> Answer:
    # forward prints shapes.
    with contextlib.redirect_stdout(io.StringIO()):
        reconstruction, _, _ = sae(x)
    return sae.get_acts(x), reconstruction


def write(out: Path, case: str, file: str, seed: int) -> None:
    weights = random_weights(seed, mean_bias=-1.0)
    sae = SparseAutoencoder(D_IN, D_SAE, k=K)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(weights[TENSORS[name]])
    checkpoint = out / case / file
    checkpoint.parent.mkdir(parents=True)
    if checkpoint.suffix == ".pth":
        torch.save(sae.state_dict(), checkpoint)
    else:
        save_file({name: tensor.contiguous() for name, tensor in sae.state_dict().items()}, checkpoint)
    write_expected(
        out / case / "expected.safetensors",
        description={
            "family": FAMILY,
            "library": "mistral-sae",
            "version": version("mistral-sae"),
            "class": "SparseAutoencoder",
            "case": case,
            "checkpoint": file,
            "k": str(K),
            "layer": str(LAYER),
        },
        model=sae,
        answer=answer,
        inputs=make_inputs(seed, weights["W_enc"]),
        ties=True,
    )


def main(out: Path) -> None:
    write(out, "pth", "mistral-7b.pth", 500)
    write(out, "safetensors", "mistral-7b-layer16/sae.safetensors", 501)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
