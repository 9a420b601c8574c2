"""Switch SAEs as amudide/switch_sae saves them: a class that its fork of dictionary_learning adds.

`python -m tests.conformance.switch_sae OUT`. The fork is no package, so the folder is written from its layout
(`dictionary_learning/trainers/switch.py`: `SwitchAutoEncoder`, `SwitchTrainer.config`) and the answer is computed here
from its equations.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.weights import D_IN, D_SAE, random_weights, rounded

FOLDER = "switch_sae"
COMMIT = "1b48457"
K = 3
EXPERTS = 4
HOOK = "resid_post_layer_3"


@dataclass(frozen=True)
class Case:
    """heaviside: what an expert finds is not multiplied by the router's probability for it."""

    name: str
    heaviside: bool = False


CASES = (Case("switch"), Case("switch_heaviside", heaviside=True))


class Switch(nn.Module):
    """Parameters under the names of the published state dict."""

    def __init__(self, seed: int, heaviside: bool) -> None:
        super().__init__()
        weights = random_weights(seed)
        random = np.random.Generator(np.random.PCG64(2000 + seed))
        self.heaviside = heaviside
        self.encoder = nn.Linear(D_IN, D_SAE, bias=False)
        self.router = nn.Linear(D_IN, EXPERTS, bias=False)
        self.decoder = nn.Parameter(weights["W_dec"])
        self.b_dec = nn.Parameter(weights["b_dec"])
        self.b_router = nn.Parameter(rounded(0.5 * random.standard_normal(D_IN)))
        with torch.no_grad():
            self.encoder.weight.copy_(weights["W_enc"].T)
            self.router.weight.copy_(rounded(random.standard_normal((EXPERTS, D_IN)) / D_IN**0.5))

    def answer(self, x: torch.Tensor) -> Answer:
        pre_acts = (x - self.b_dec) @ self.encoder.weight.T
        probabilities = ((x - self.b_router) @ self.router.weight.T).softmax(-1)
        p, expert = probabilities.max(-1, keepdim=True)
        mine = torch.arange(D_SAE) // (D_SAE // EXPERTS) == expert
        found = torch.where(mine, pre_acts.relu(), 0.0) * (1.0 if self.heaviside else p)
        top = found.topk(K, dim=-1)
        activations = torch.zeros_like(found).scatter(-1, top.indices, top.values)
        return activations, activations @ self.decoder + self.b_dec


def write(out: Path, case: Case, seed: int) -> None:
    model = Switch(seed, case.heaviside)
    checkpoint = f"{HOOK}/trainer_0"
    folder = out / case.name / checkpoint
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "ae.pt")
    trainer = {
        "trainer_class": "SwitchTrainer",
        "dict_class": "SwitchAutoEncoder",
        "lr": 2e-4,
        "steps": 30_000,
        "seed": None,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "k": K,
        "experts": EXPERTS,
        "heaviside": case.heaviside,
        "lb_alpha": 0.01,
        "device": "cpu",
        "layer": 3,
        "lm_name": "openai-community/gpt2",
        "wandb_name": "SwitchAutoEncoder",
        "submodule_name": HOOK,
    }
    buffer = {"d_submodule": D_IN, "io": "out", "n_ctxs": 30_000, "ctx_len": 128, "device": "cpu"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}, indent=4))
    write_expected(
        out / case.name / "expected.safetensors",
        description={
            "family": "dictionary_learning",
            "library": "layout of switch_sae",
            "version": COMMIT,
            "class": "SwitchAutoEncoder",
            "case": case.name,
            "checkpoint": checkpoint,
        },
        model=model,
        answer=Switch.answer,
        inputs=make_inputs(seed, random_weights(seed)["W_enc"]),
        ties=True,
    )


def main(out: Path) -> None:
    for seed, case in enumerate(CASES, start=170):
        write(out, case, seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FOLDER)
