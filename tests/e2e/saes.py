"""SAEs of the architectures that the project does not ship, made of the weights of the one that it does."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

JUMPRELU_LAYER, STANDARD_LAYER = 15, 9
# In units of the shipped SAE's activations: few features of a token exceed it.
THRESHOLD = 4.0


def standard_and_jumprelu(shipped: Path, root: Path) -> dict[str, Path]:
    """A ReLU SAE at another layer and a JumpReLU SAE at the same one, in fp32."""
    weights = {name: tensor.float() for name, tensor in load_file(shipped / "sae_weights.safetensors").items()}
    config = json.loads((shipped / "cfg.json").read_text())
    d_sae = config["d_sae"]
    thresholds = THRESHOLD * torch.linspace(0.5, 1.5, d_sae)
    made = {
        "test/relu": ("standard", STANDARD_LAYER, {}),
        "test/jumprelu": ("jumprelu", JUMPRELU_LAYER, {"threshold": thresholds}),
    }
    folders = {}
    for name, (architecture, layer, extra) in made.items():
        folder = root / architecture
        folder.mkdir()
        save_file(weights | extra, folder / "sae_weights.safetensors")
        metadata = {"model_name": config["metadata"]["model_name"], "hook_name": f"blocks.{layer}.hook_resid_post"}
        changed = config | {"architecture": architecture, "dtype": "float32", "metadata": metadata}
        (folder / "cfg.json").write_text(json.dumps(changed))
        folders[name] = folder
    return folders


def every_kind(root: Path, d_model: int, d_sae: int, layers: list[int]) -> dict[str, Path]:
    """Random SAEs at every kind of hook point, with every selection and token norm; layers: nine of them, ascending."""

    def place(kind, at=0):
        return f"blocks.{layers[at]}.{kind}"

    residual = "hook_resid_post"
    transcoder = {"hook_name": place("mlp.hook_in", 5), "hook_name_out": place("hook_mlp_out", 5)}
    skipping = {"hook_name": place("mlp.hook_in", 6), "hook_name_out": place("hook_mlp_out", 6)}
    group = {"hook_names": [place(residual, 7), place(residual, 8)]}
    k = d_sae // 16
    made: dict[str, tuple[str, dict, dict]] = {
        "kind/resid_pre": ("standard", {"hook_name": "blocks.0.hook_resid_pre"}, {}),
        "kind/attn_out": ("standard", {"hook_name": place("hook_attn_out", 1)}, {}),
        "kind/mlp_out": ("gated", {"hook_name": place("hook_mlp_out", 2)}, {}),
        "kind/mlp_in": ("jumprelu", {"hook_name": place("mlp.hook_in", 2)}, {}),
        "kind/layer_norm": (
            "topk",
            {"hook_name": place(residual, 1)},
            {"k": k, "normalize_activations": "layer_norm"},
        ),
        "kind/constant_norm": (
            "standard",
            {"hook_name": place(residual, 2)},
            {"normalize_activations": "constant_norm_rescale"},
        ),
        "kind/abstopk": ("abstopk", {"hook_name": place(residual, 3)}, {"k": k}),
        "kind/groupmax": ("groupmax", {"hook_name": place(residual, 4)}, {"k": k}),
        "kind/switch": ("switch", {"hook_name": place(residual, 5)}, {"k": max(1, k // 4), "experts": 4}),
        "kind/transcoder": ("transcoder", transcoder, {"d_out": d_model, "normalize_activations": "layer_norm"}),
        "kind/topk_transcoder": ("topk_skip_transcoder", skipping, {"d_out": d_model, "k": k}),
        "kind/layer_group": ("layer_group", group, {}),
    }
    folders = {}
    for seed, (name, (architecture, metadata, options)) in enumerate(made.items()):
        folder = folders[name] = root / name.replace("/", "-")
        folder.mkdir()
        save_file(_random_weights(architecture, d_model, d_sae, options, seed), folder / "sae_weights.safetensors")
        config = {
            "architecture": architecture,
            "d_in": d_model,
            "d_sae": d_sae,
            "dtype": "float32",
            "apply_b_dec_to_input": "transcoder" not in architecture,
            "normalize_activations": "none",
            "metadata": {"steer_server": {"skip_first": 1}} | metadata,
        }
        (folder / "cfg.json").write_text(json.dumps(config | options))
    return folders


def _random_weights(architecture: str, d_model: int, d_sae: int, options: dict, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {
        "W_enc": random(d_model, d_sae) / d_model**0.5,
        "W_dec": torch.nn.functional.normalize(random(d_sae, d_model), dim=-1),
        "b_enc": random(d_sae) * 0.1,
        "b_dec": random(d_model) * 0.1,
    }
    if architecture == "jumprelu":
        weights["threshold"] = random(d_sae).abs() * 0.2
    if architecture == "gated":
        del weights["b_enc"]
        weights |= {"b_gate": random(d_sae) * 0.1, "b_mag": random(d_sae) * 0.1, "r_mag": random(d_sae) * 0.3}
    if architecture == "switch":
        experts = options["experts"]
        weights |= {"W_router": random(d_model, experts) / d_model**0.5, "b_router": random(experts) * 0.1}
    if "skip" in architecture:
        weights["W_skip"] = random(d_model, d_model) * 0.01
    return weights
