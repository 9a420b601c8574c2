"""What tests share: the embedded model, the SAEs that are made from the shipped one, and the engines."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says nothing on a machine that does other things too.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Before anything of vLLM is imported: little memory for the KV cache, and the plugin in every process.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_PLUGINS", "steer_server")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _environment():
    """Commands that run in this process set what vLLM reads from the environment; later tests see none of it."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def model_dir() -> Path:
    from steer_server.embedded_model import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="session")
def saes(tmp_path_factory) -> dict[str, str]:
    """Folder by name: the shipped TopK SAE, and its weights under the other activation functions."""
    from tests.e2e.saes import standard_and_jumprelu

    shipped = Path(__file__).parents[1] / "sae_models" / "pretrained" / "smollm2-135m-l15"
    derived = standard_and_jumprelu(shipped, tmp_path_factory.mktemp("saes"))
    return {"smollm2-135m/l15": str(shipped)} | {name: str(folder) for name, folder in derived.items()}


@pytest.fixture(scope="session")
def kinds(tmp_path_factory) -> dict[str, str]:
    """Folder by name: random SAEs for the embedded model at every kind of place, of every kind."""
    from tests.e2e.saes import every_kind

    folders = every_kind(tmp_path_factory.mktemp("kinds"), 576, 256, [3, 7, 11, 13, 14, 16, 18, 20, 21])
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def oracle(model_dir, saes, kinds):
    from tests.oracle.hf_oracle import Oracle

    return Oracle(model_dir, saes | kinds)
