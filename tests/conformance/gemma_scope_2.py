"""Gemma Scope 2: the published layout of `params.safetensors`, and its equations.

`python -m tests.conformance.gemma_scope_2 OUT`. No library writes these; names and shapes are those of the repositories
`google/gemma-scope-2-*`, the equations those of their model cards. SAELens' loader for them is asked for its answers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from sae_lens.loading.pretrained_sae_loaders import gemma_3_sae_huggingface_loader
from safetensors.torch import save_file

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.saelens_answer import saelens_answer
from tests.conformance.weights import D_SAE, EXACT_THRESHOLD, random_weights

FAMILY = "gemma_scope_2"
LAYOUT = "google/gemma-scope-2"
LAYER, LAYERS = 3, 6


@dataclass(frozen=True)
class Case:
    """config: the model that `config.json` names; None where a repository has no such file."""

    name: str
    repository: str
    folder: str
    config: str | None = None
    affine: bool = False

    @property
    def is_cross_layer(self) -> bool:
        return self.folder.startswith("clt")

    @property
    def is_transcoder(self) -> bool:
        return self.is_cross_layer or self.folder.startswith("transcoder")


CASES = (
    Case("resid_post", "gemma-scope-2-1b-pt", "resid_post/layer_3_width_65k_l0_medium", "google/gemma-3-1b-pt"),
    Case("resid_post_all", "gemma-scope-2-270m-pt", "resid_post_all/layer_3_width_16k_l0_small"),
    Case("mlp_out", "gemma-scope-2-4b-it", "mlp_out/layer_3_width_16k_l0_big", "gemma-v3-4b-it"),
    Case("attn_out", "gemma-scope-2-4b-it", "attn_out_all/layer_3_width_16k_l0_big"),
    Case("transcoder", "gemma-scope-2-12b-pt", "transcoder/layer_3_width_16k_l0_small", "google/gemma-3-12b-pt"),
    Case("transcoder_all", "gemma-scope-2-27b-it", "transcoder_all/layer_3_width_16k_l0_big"),
    Case("affine", "gemma-scope-2-1b-it", "transcoder_all/layer_3_width_16k_l0_big_affine", affine=True),
    Case(
        "affine_with_config",
        "gemma-scope-2-1b-it",
        "transcoder/layer_3_width_16k_l0_big_affine",
        "google/gemma-3-1b-it",
        affine=True,
    ),
    Case("clt", "gemma-scope-2-270m-pt", "clt/width_262k_l0_medium"),
    Case("clt_affine", "gemma-scope-2-270m-pt", "clt/width_262k_l0_medium_affine", affine=True),
)


class GemmaScope2(torch.nn.Module):
    """The tensors as stored."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name, value)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pre_acts = x @ self.w_enc + self.b_enc
        return torch.relu(pre_acts) * (pre_acts > self.threshold)

    def forward(self, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        """The reconstruction; of a cross-layer transcoder, what is written to the layer that is read."""
        w_dec = self.w_dec if self.w_dec.ndim == 2 else self.w_dec[:, LAYER]
        out = f @ w_dec + self.b_dec
        return out + x @ self.affine_skip_connection if hasattr(self, "affine_skip_connection") else out


def answer(sae: GemmaScope2, x: torch.Tensor) -> Answer:
    activations = sae.encode(x)
    return activations, sae(x, activations)


def stored(case: Case, seed: int) -> dict[str, torch.Tensor]:
    drawn = random_weights(seed)
    weights = {name.lower(): drawn[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if case.is_cross_layer:
        # Of the layers below nothing is written to.
        w_dec = torch.zeros(D_SAE, LAYERS, drawn["W_dec"].shape[1])
        for layer in range(LAYER, LAYERS):
            w_dec[:, layer] = drawn["W_dec"] if layer == LAYER else random_weights(seed + 50 + layer)["W_dec"]
        weights["w_dec"] = w_dec
    if case.affine:
        weights["affine_skip_connection"] = drawn["W_skip"].T.contiguous()
    return weights


def write_config(folder: Path, case: Case) -> None:
    site = case.folder.split("/")[0].removesuffix("_all")
    mlp = (
        f"model.layers.{LAYER}.pre_feedforward_layernorm.output",
        f"model.layers.{LAYER}.post_feedforward_layernorm.output",
    )
    hooks = {
        "resid_post": (f"model.layers.{LAYER}.output",) * 2,
        "attn_out": (f"model.layers.{LAYER}.self_attn.o_proj.input",) * 2,
        "mlp_out": (mlp[1],) * 2,
        "transcoder": mlp,
    }[site]
    config = {
        "architecture": "jump_relu",
        "model_name": case.config,
        "hf_hook_point_in": hooks[0],
        "hf_hook_point_out": hooks[1],
        "width": D_SAE,
        "l0": 60,
        "affine_connection": case.affine,
        "type": "transcoder" if case.is_transcoder else "sae",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write(out: Path, case: Case, seed: int) -> None:
    weights = stored(case, seed)
    repository = out / case.name / case.repository
    folder = repository / case.folder
    folder.mkdir(parents=True)
    file = f"params_layer_{LAYER}.safetensors" if case.is_cross_layer else "params.safetensors"
    save_file(weights, folder / file)
    if case.config is not None:
        write_config(folder, case)
    inputs = make_inputs(seed, weights["w_enc"], threshold=EXACT_THRESHOLD, subtracts_b_dec=False)
    published = f"{case.folder}/params_layer_{LAYER}" if case.is_cross_layer else case.folder
    others, notes = saelens_answer(gemma_3_sae_huggingface_loader, repository, published, inputs.x)
    write_expected(
        out / case.name / "expected.safetensors",
        description={
            "family": FAMILY,
            "library": LAYOUT,
            "version": "layout",
            "class": "JumpReLU transcoder" if case.is_transcoder else "JumpReLU SAE",
            "case": case.name,
            "checkpoint": f"{case.repository}/{case.folder}" + (f"/{file}" if case.is_cross_layer else ""),
        }
        | notes,
        model=GemmaScope2(weights),
        answer=answer,
        inputs=inputs,
        others=others,
    )


def main(out: Path) -> None:
    for seed, case in enumerate(CASES, start=700):
        write(out, case, seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
