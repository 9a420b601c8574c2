"""SAE folders for tests, written as SAELens writes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def build_sae(
    folder: Path, architecture="standard", d_in=8, d_sae=24, layer=1, seed=0, k=4, tensors=None, cfg=None
) -> Path:
    """A random SAE in SAELens format; `tensors` and `cfg` override what is written."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    weights = {
        "W_enc": random(d_in, d_sae) / d_in**0.5,
        "W_dec": torch.nn.functional.normalize(random(d_sae, d_in), dim=-1),
        "b_enc": random(d_sae) * 0.1,
        "b_dec": random(d_in) * 0.1,
    }
    if architecture == "jumprelu":
        weights["threshold"] = random(d_sae).abs() * 0.2
    settings = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"model_name": "test-model", "hook_name": f"blocks.{layer}.hook_resid_post"},
    }
    if architecture == "topk":
        settings |= {"k": k, "rescale_acts_by_decoder_norm": False}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights | (tensors or {}), folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(settings | (cfg or {})))
    return folder
