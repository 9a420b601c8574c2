"""Steer any vLLM server: sparse autoencoder features and steering vectors, per request, over the OpenAI API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer_server.llm import SteeredLLM

__version__ = "0.1.0"
__all__ = ["SteeredLLM", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing the package must not import torch and vLLM.
    if name == "SteeredLLM":
        from steer_server.llm import SteeredLLM

        return SteeredLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
