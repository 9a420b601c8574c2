"""A hub of this machine for the tests, and an empty cache for its client."""

import pytest
from huggingface_hub import constants

from tests.catalog.hub_server import Hub, served


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub that huggingface_hub asks, through HTTP, with a cache of the test's own."""
    hub = Hub()
    with served(hub) as address:
        # What huggingface_hub makes of HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE when it is imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def offline(monkeypatch):
    """Call it, and it is as if HF_HUB_OFFLINE had been set."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
