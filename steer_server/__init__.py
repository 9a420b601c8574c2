"""Steer any vLLM server: sparse autoencoder features and steering vectors, per request, over the OpenAI API."""

__version__ = "0.1.0"
