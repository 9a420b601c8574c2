"""The random Llama with SAEs at every kind of place, for tests in which its weights mean nothing."""

import pytest


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    from tests.e2e.random_cases import LAYERS
    from tests.e2e.tiny_models import random_llama

    return random_llama(tmp_path_factory.mktemp("random") / "llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="session")
def random_saes(tmp_path_factory):
    from tests.e2e.random_cases import D_MODEL, SAE_LAYERS
    from tests.e2e.saes import every_kind

    folders = every_kind(tmp_path_factory.mktemp("random_saes"), D_MODEL, 256, SAE_LAYERS)
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def random_oracle(random_model, random_saes):
    from tests.oracle.hf_oracle import Oracle

    return Oracle(random_model, random_saes)


@pytest.fixture(scope="session")
def random_specs(random_oracle):
    from tests.e2e import random_cases

    return random_cases.random_specs(random_oracle)
