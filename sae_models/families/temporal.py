"""Temporal SAEs (arXiv 2511.01836): `conf.yaml` beside `latest_ckpt.safetensors`. Recognised, and refused."""

from __future__ import annotations

from typing import NoReturn

from sae_models.architectures import REFUSED
from sae_models.checkpoint import Checkpoint

NAME = "Temporal SAEs"
LAYOUT = "conf.yaml, latest_ckpt.safetensors"
VERSIONS = "refused"
ARCHITECTURES: tuple[str, ...] = ()


def detect(checkpoint: Checkpoint) -> bool:
    return checkpoint.has("conf.yaml", "latest_ckpt.safetensors")


def load(checkpoint: Checkpoint) -> NoReturn:
    raise checkpoint.error(f"temporal SAEs are not supported: {REFUSED['temporal']}")
