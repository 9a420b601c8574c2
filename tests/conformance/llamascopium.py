"""Llamascopium: the published layouts of OpenMOSS's library since 2025, and their equations.

`python -m tests.conformance.llamascopium OUT`. The equations are those of `SparseAutoEncoder.encode` and `decode`
between `normalize_activations` and `denormalize_activations` (OpenMOSS/Language-Model-SAEs at 95281ac7, Llama Scope
R1-Distill's at b5c5bb22), which is how it is trained. SAELens' loader for R1-Distill is asked for its answer.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens.loading.pretrained_sae_loaders import llama_scope_r1_distill_sae_huggingface_loader
from safetensors.torch import save_file

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.saelens_answer import saelens_answer
from tests.conformance.weights import D_IN, D_SAE, EXACT, random_weights

FAMILY = "llamascopium"
K = 3
THRESHOLD = 1.0
"""Of the exact feature, and of BatchTopK: its logarithm and the exponential of that are exact."""
EXACT_NORM = 2.0
RESID, MLP_IN, MLP_OUT = "blocks.3.hook_resid_post", "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"


@dataclass(frozen=True)
class Case:
    """norms: mean norms of what is read and written. config: what differs from the library's defaults."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    hooks: tuple[str, str] = (RESID, RESID)
    norms: tuple[float, float] = (2.0, 2.0)
    folder: str = "sae"
    is_r1_distill: bool = False


CASES = (
    Case("relu"),
    Case("jumprelu", {"act_fn": "jumprelu"}),
    Case("jumprelu_without_decoder_norm", {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False}),
    Case("jumprelu_inference", {"act_fn": "jumprelu", "norm_activation": "inference"}),
    Case("jumprelu_transcoder", {"act_fn": "jumprelu"}, (MLP_IN, MLP_OUT), (4.0, 1.0)),
    Case("topk", {"act_fn": "topk"}),
    Case("topk_without_decoder_norm", {"act_fn": "topk", "sparsity_include_decoder_norm": False}),
    Case("topk_transcoder", {"act_fn": "topk"}, (MLP_IN, MLP_OUT), (4.0, 1.0)),
    Case("batchtopk", {"act_fn": "batchtopk"}),
    Case("token_wise", {"norm_activation": "token-wise"}),
    Case("without_decoder_bias", {"use_decoder_bias": False}),
    Case(
        "r1_distill",
        {"act_fn": "jumprelu"},
        folder="Llama-Scope-R1-Distill/400M-Slimpajama-400M-OpenR1-Math-220k/L3R",
        is_r1_distill=True,
    ),
)


def configuration(case: Case) -> dict[str, Any]:
    config = {
        "sae_type": "sae",
        "d_model": D_IN,
        "expansion_factor": D_SAE // D_IN if case.is_r1_distill else D_SAE / D_IN,
        "use_decoder_bias": True,
        "act_fn": "relu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": K,
        "use_triton_kernel": False,
        "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "jumprelu_threshold_window": 2.0,
        "hook_point_in": case.hooks[0],
        "hook_point_out": case.hooks[1],
        "use_glu_encoder": False,
    }
    if case.is_r1_distill:
        config |= {"apply_decoder_bias_to_pre_encoder": False, "force_unit_decoder_norm": False}
    return config | case.config


class Llamascopium(torch.nn.Module):
    """Tensors in training space, by the library's names."""

    def __init__(self, weights: dict[str, torch.Tensor], config: dict[str, Any], norms: tuple[float, float]) -> None:
        super().__init__()
        self.config, self.norms = config, norms
        for name in ("W_E", "b_E", "W_D", "b_D", "log_jumprelu_threshold"):
            self.register_buffer(name, weights[name])

    def factors(self, x: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """What inputs and outputs are multiplied by before training sees them."""
        root = D_IN**0.5
        if self.config["norm_activation"] == "inference":
            return 1.0, 1.0
        if self.config["norm_activation"] == "token-wise":
            return (root / x.norm(dim=-1, keepdim=True),) * 2
        return root / self.norms[0], root / self.norms[1]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """As the library's `encode` of normalised activations."""
        h = x * self.factors(x)[0] @ self.W_E + self.b_E
        norm = self.W_D.norm(dim=1) if self.config["sparsity_include_decoder_norm"] else torch.ones_like(h[0])
        return self.act(h * norm) / norm

    def act(self, seen: torch.Tensor) -> torch.Tensor:
        kind = self.config["act_fn"]
        if kind == "topk":
            top = seen.relu().topk(K, dim=-1)
            return torch.zeros_like(seen).scatter(-1, top.indices, top.values)
        threshold = {"relu": 0.0, "batchtopk": THRESHOLD}.get(kind, self.log_jumprelu_threshold.exp())
        return seen * (seen > threshold)

    def decode(self, f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = f @ self.W_D
        return (out + self.b_D if self.config["use_decoder_bias"] else out) / self.factors(x)[1]

    def seen(self, f: torch.Tensor) -> torch.Tensor:
        """What the activation function sees of activations, in units of the stream where it sees decoder norms."""
        if not self.config["sparsity_include_decoder_norm"]:
            return f
        by_dataset = self.config["norm_activation"] == "dataset-wise"
        return f * self.W_D.norm(dim=1) * (self.norms[1] / D_IN**0.5 if by_dataset else 1.0)


def answer(sae: Llamascopium, x: torch.Tensor) -> Answer:
    activations = sae.encode(x)
    return sae.seen(activations), sae.decode(activations, x)


def stored(case: Case, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    state = {name: weights[name] for name in ("W_E", "b_E", "W_D")}
    if config["use_decoder_bias"]:
        state["b_D"] = weights["b_D"]
    if config["act_fn"] == "jumprelu":
        state["activation_function.log_jumprelu_threshold"] = weights["log_jumprelu_threshold"]
    if case.is_r1_distill:
        state = {
            "encoder.weight": weights["W_E"].T,
            "encoder.bias": weights["b_E"],
            "decoder.weight": weights["W_D"].T,
            "decoder.bias": weights["b_D"],
            "log_jumprelu_threshold": weights["log_jumprelu_threshold"],
        }
    for hook, norm in zip(case.hooks, case.norms, strict=True):
        # Without norms of the data set the library saves whatever memory held.
        value = norm if config["norm_activation"] == "dataset-wise" else 1e30
        state[f"dataset_average_activation_norm.{hook}"] = torch.tensor(value)
    return {name: value.contiguous() for name, value in state.items()}


def write(out: Path, case: Case, seed: int) -> None:
    config = configuration(case)
    drawn = random_weights(seed, mean_bias=-1.0 if case.config.get("act_fn") == "topk" else 0.0)
    thresholds = drawn["threshold"] + 0.5
    thresholds[EXACT] = THRESHOLD
    weights = {
        "W_E": drawn["W_enc"],
        "b_E": drawn["b_enc"],
        "W_D": drawn["W_dec"],
        "b_D": drawn["b_dec"],
        "log_jumprelu_threshold": thresholds.log(),
    }
    folder = out / case.name / case.folder
    folder.mkdir(parents=True)
    save_file(stored(case, weights, config), folder / "sae_weights.safetensors", {"version": "2.0.0"})
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    model = Llamascopium(weights, config, case.norms)
    by_token = config["norm_activation"] == "token-wise"
    s_in = D_IN**0.5 / case.norms[0] if config["norm_activation"] == "dataset-wise" else 1.0
    threshold = THRESHOLD if config["act_fn"] in ("jumprelu", "batchtopk") else 0.0
    inputs = make_inputs(
        seed,
        weights["W_E"],
        threshold=threshold / EXACT_NORM if config["sparsity_include_decoder_norm"] else threshold,
        subtracts_b_dec=False,
        scale=s_in,
        zeros=not by_token,
    )
    others = {"library_activations": model.encode(inputs.x)}
    notes: dict[str, str] = {}
    if case.is_r1_distill:
        repository = out / case.name / case.folder.split("/")[0]
        answers, notes = saelens_answer(
            llama_scope_r1_distill_sae_huggingface_loader,
            repository,
            str(folder.relative_to(repository)),
            inputs.x,
            norm_scaling_factor=s_in,
        )
        others |= answers
    if config["act_fn"] == "batchtopk":
        notes["threshold"] = str(THRESHOLD)
    write_expected(
        out / case.name / "expected.safetensors",
        description={
            "family": FAMILY,
            "library": "OpenMOSS equations",
            "version": "b5c5bb22" if case.is_r1_distill else "95281ac7",
            "class": "SparseAutoEncoder",
            "case": case.name,
            "checkpoint": case.folder,
        }
        | notes,
        model=model,
        answer=answer,
        inputs=inputs,
        ties=config["act_fn"] == "topk",
        others=others,
    )


def main(out: Path) -> None:
    for seed, case in enumerate(CASES, start=900):
        write(out, case, seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
