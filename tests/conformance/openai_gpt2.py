"""OpenAI's SAEs of GPT-2 small, as github.com/openai/sparse_autoencoder stores and runs them.

`python -m tests.conformance.openai_gpt2 OUT`. The library is in no package registry; `model.py` gives names and
equations, `paths.py` the folders. The state dict of v1 has no activation in it, those of v5 have.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.weights import D_IN, D_SAE, random_weights

FAMILY = "openai_gpt2"
K = 3
LAYER = 6


class Autoencoder(nn.Module):
    """k: of a TopK autoencoder, which normalises its input; None for a ReLU one, which does not."""

    def __init__(self, weights: dict[str, torch.Tensor], k: int | None) -> None:
        super().__init__()
        self.k = k
        self.pre_bias = nn.Parameter(weights["b_dec"])
        self.latent_bias = nn.Parameter(weights["b_enc"])
        self.encoder = nn.Linear(D_IN, D_SAE, bias=False)
        self.decoder = nn.Linear(D_SAE, D_IN, bias=False)
        with torch.no_grad():
            self.encoder.weight.copy_(weights["W_enc"].T)
            self.decoder.weight.copy_(weights["W_dec"].T)

    def published(self) -> dict[str, Any]:
        """The state dict, with the training statistics that are saved with it."""
        state: dict[str, Any] = OrderedDict(self.state_dict())
        state["stats_last_nonzero"] = torch.zeros(D_SAE, dtype=torch.long)
        state["latents_activation_frequency"] = torch.ones(D_SAE)
        state["latents_mean_square"] = torch.zeros(D_SAE)
        if self.k is not None:
            state["activation"] = "TopK"
            state["activation_state_dict"] = OrderedDict(k=self.k, postact_fn="ReLU")
        return state


def answer(sae: Autoencoder, x: torch.Tensor) -> Answer:
    mean, std = torch.zeros_like(x[:, :1]), torch.ones_like(x[:, :1])
    if sae.k is not None:
        mean = x.mean(dim=-1, keepdim=True)
        std = (x - mean).std(dim=-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    pre_acts = sae.encoder(x - sae.pre_bias) + sae.latent_bias
    if sae.k is None:
        activations = torch.relu(pre_acts)
    else:
        top = pre_acts.topk(sae.k, dim=-1)
        activations = torch.zeros_like(pre_acts).scatter(-1, top.indices, torch.relu(top.values))
    reconstruction = sae.decoder(activations) + sae.pre_bias
    return activations, reconstruction if sae.k is None else reconstruction * std + mean


def write(out: Path, case: str, release: str, seed: int, k: int | None) -> None:
    checkpoint = out / case / release / "autoencoders" / f"{LAYER}.pt"
    checkpoint.parent.mkdir(parents=True)
    weights = random_weights(seed, mean_bias=0.0 if k is None else -0.5)
    sae = Autoencoder(weights, k)
    torch.save(sae.published(), checkpoint)
    write_expected(
        out / case / "expected.safetensors",
        description={
            "family": FAMILY,
            "library": "none: github.com/openai/sparse_autoencoder",
            "version": version("torch"),
            "class": "Autoencoder",
            "case": case,
            "checkpoint": checkpoint.relative_to(out / case).as_posix(),
            **({} if k is None else {"k": str(k)}),
        },
        model=sae,
        answer=answer,
        inputs=make_inputs(seed, weights["W_enc"]),
        ties=k is not None,
    )


def main(out: Path) -> None:
    write(out, "v1_resid_delta_mlp", "resid_delta_mlp", 630, None)
    write(out, "v4_mlp_post_act", "mlp_post_act_v4", 631, None)
    for seed, place in enumerate(("resid_delta_attn", "resid_post_attn", "resid_post_mlp"), start=632):
        write(out, f"v5_{place}", f"{place}_v5_32k", seed, K)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
