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
