"""Models of no training: a configuration whose weights are vLLM's dummies, or a Llama with random weights on disk."""

import json
from pathlib import Path

import torch

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": 512,
    "torch_dtype": "float32",
}
DUMMY = ["--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "128"]


def tiny(folder: Path, config: dict, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def random_llama(folder: Path, seed: int = 0, **changes) -> Path:
    """A Llama whose heads divide by two, with weights large enough that its layers matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {name: value for name, value in LLAMA.items() if name not in ("architectures", "torch_dtype")}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | {"initializer_range": 0.1} | changes)))
    model.save_pretrained(folder)
    return folder


def random_adapter(folder: Path, model: Path, seed: int, rank: int = 8) -> tuple[Path, Path]:
    """A LoRA adapter of a random Llama, as PEFT writes them, and the model with it merged in: their folders."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    generator = torch.Generator().manual_seed(seed)
    merged = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    tensors = {}
    for name, module in merged.named_modules():
        if name.endswith(targets):
            A = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            B = torch.randn(module.out_features, rank, generator=generator) * 0.2
            tensors[f"base_model.model.{name}.lora_A.weight"] = A
            tensors[f"base_model.model.{name}.lora_B.weight"] = B
            module.weight.data += 2.0 * B @ A
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
        "base_model_name_or_path": str(model),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged.save_pretrained(folder / "merged")
    return adapter, folder / "merged"


def random_eagle(folder: Path, model: Path) -> Path:
    """An EAGLE head for a random Llama: the model's first layer behind a projection that keeps the embedding."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    d_model = embedding.shape[1]
    first = {name.removeprefix("model."): tensor for name, tensor in weights.items() if ".layers.0." in name}
    first.pop("layers.0.input_layernorm.weight")
    projection = torch.cat([torch.eye(d_model), torch.zeros(d_model, d_model)], dim=1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(first | {"fc.weight": projection}, folder / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return folder
