"""Llama Scope: the published layout of lm-saes of 2024, and its equations.

`python -m tests.conformance.llama_scope OUT`. lm-saes of that time is not on PyPI; the equations are those of its
`SparseAutoEncoder.encode` after `from_config` has folded norms (OpenMOSS/Language-Model-SAEs at 5e5527b7), written
without folding. SAELens' loader for this family is asked for its answers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens.loading.pretrained_sae_loaders import llama_scope_sae_huggingface_loader
from safetensors.torch import save_file

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.saelens_answer import saelens_answer
from tests.conformance.weights import D_IN, D_SAE, EXACT_THRESHOLD, random_weights

FAMILY = "llama_scope"
K = 3
EXACT_NORM = 2.0
"""Of the decoder row of the exact feature of `random_weights`."""


@dataclass(frozen=True)
class Case:
    """norms: mean norms of what is read and written. config: what differs from the published configurations."""

    name: str
    folder: str = "Llama3_1-8B-Base-L3R-8x"
    hooks: tuple[str, str] = ("blocks.3.hook_resid_post", "blocks.3.hook_resid_post")
    norms: tuple[float, float] = (2.0, 2.0)
    config: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("residual"),
    Case("mlp", "Llama3_1-8B-Base-L3M-32x", ("blocks.3.hook_mlp_out",) * 2, (4.0, 4.0)),
    Case(
        "transcoder", "Llama3_1-8B-Base-L3TC-8x", ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"), (4.0, 1.0)
    ),
    Case("without_decoder_norm", config={"sparsity_include_decoder_norm": False}),
    Case("b_dec_read", config={"apply_decoder_bias_to_pre_encoder": True}),
    Case("relu", config={"act_fn": "relu", "jump_relu_threshold": 0.0}),
    Case("topk", config={"act_fn": "topk", "jump_relu_threshold": 0.0}),
    Case("token_wise", config={"norm_activation": "token-wise", "dataset_average_activation_norm": None}),
)


def configuration(case: Case) -> dict[str, Any]:
    return {
        "device": "cuda:0",
        "seed": 42,
        "dtype": "torch.bfloat16",
        "hook_point_in": case.hooks[0],
        "hook_point_out": case.hooks[1],
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": D_SAE // D_IN,
        "d_model": D_IN,
        "d_sae": D_SAE,
        "bias_init_method": "all_zero",
        "act_fn": "jumprelu",
        "jump_relu_threshold": EXACT_THRESHOLD,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": case.norms[0], "out": case.norms[1]},
        "decoder_exactly_fixed_norm": False,
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "init_decoder_norm": 0.5,
        "init_encoder_norm": None,
        "init_encoder_with_decoder_transpose": True,
        "top_k": K,
        **case.config,
    }


class LlamaScope(torch.nn.Module):
    """The tensors as stored, in training space; activations as the library has them after loading."""

    def __init__(self, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        for name, value in state.items():
            self.register_buffer(name.replace(".", "_"), value.float())

    def scales(self, x: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float, torch.Tensor | float]:
        """(s_in, s_out, what multiplies h to give what is compared with the threshold)."""
        root = D_IN**0.5
        norm = self.decoder_weight.norm(dim=0)
        if self.config["norm_activation"] == "token-wise":
            by_token = root / x.norm(dim=-1, keepdim=True)
            return by_token, by_token, norm
        means = self.config["dataset_average_activation_norm"]
        s_in, s_out = root / means["in"], root / means["out"]
        return s_in, s_out, norm / s_out if self.config["sparsity_include_decoder_norm"] else 1 / s_in

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        s_in, _, unit = self.scales(x)
        z = x * s_in
        if self.config["apply_decoder_bias_to_pre_encoder"]:
            z = z - self.decoder_bias
        seen = (z @ self.encoder_weight.T + self.encoder_bias) * unit
        if self.config["act_fn"] == "topk":
            top = seen.topk(K, dim=-1)
            return torch.zeros_like(seen).scatter(-1, top.indices, top.values.relu())
        return torch.where(seen > self.config["jump_relu_threshold"], seen, 0.0)

    def decode(self, f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        _, s_out, unit = self.scales(x)
        return ((f / unit) @ self.decoder_weight.T + self.decoder_bias) / s_out


def answer(sae: LlamaScope, x: torch.Tensor) -> Answer:
    activations = sae.encode(x)
    return activations, sae.decode(activations, x)


def write(out: Path, case: Case, seed: int) -> None:
    config = configuration(case)
    drawn = random_weights(seed, mean_bias=-1.0 if case.name == "topk" else 0.0)
    state = {
        "encoder.weight": drawn["W_enc"].T,
        "encoder.bias": drawn["b_enc"],
        "decoder.weight": drawn["W_dec"].T,
        "decoder.bias": drawn["b_dec"],
    }
    state = {name: value.bfloat16().contiguous() for name, value in state.items()}
    repository = out / case.name
    folder = repository / case.folder
    (folder / "checkpoints").mkdir(parents=True)
    save_file(state, folder / "checkpoints" / "final.safetensors", {"version": "0.1.0"})
    (folder / "hyperparams.json").write_text(json.dumps(config, indent=4) + "\n")
    model = LlamaScope(state, config)
    by_token = config["norm_activation"] == "token-wise"
    s_in, s_out = (D_IN**0.5 / norm for norm in case.norms)
    by_norm = config["sparsity_include_decoder_norm"]
    # The pre-activation in training space at which the exact feature meets its threshold.
    meets = config["jump_relu_threshold"] * (s_out / EXACT_NORM if by_norm else s_in)
    inputs = make_inputs(
        seed,
        state["encoder.weight"].T.float(),
        threshold=meets,
        subtracts_b_dec=config["apply_decoder_bias_to_pre_encoder"],
        scale=1.0 if by_token else s_in,
        zeros=not by_token,
    )
    others: dict[str, torch.Tensor] = {}
    notes: dict[str, str] = {}
    if case.name in ("residual", "mlp", "without_decoder_norm", "transcoder"):
        others, notes = saelens_answer(
            llama_scope_sae_huggingface_loader, repository, case.folder, inputs.x, norm_scaling_factor=s_in
        )
    write_expected(
        repository / "expected.safetensors",
        description={
            "family": FAMILY,
            "library": "lm-saes equations",
            "version": "5e5527b7",
            "class": "SparseAutoEncoder",
            "case": case.name,
            "checkpoint": case.folder,
        }
        | notes,
        model=model,
        answer=answer,
        inputs=inputs,
        ties=case.name == "topk",
        others=others,
    )


def main(out: Path) -> None:
    for seed, case in enumerate(CASES, start=800):
        write(out, case, seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
