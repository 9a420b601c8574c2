"""SAELens 6: `cfg.json` beside `sae_weights.safetensors`.

Format: SAELens 6.54, `sae_lens/saes/sae.py` (`save_model`). Configuration keys are flat; what describes the model is
under `metadata`.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError, safe_open

from sae_models.hook_points import HookPoint
from sae_models.sae import SAE, Architecture, SAEFormatError

NAME = "SAELens"
FILES = "cfg.json, sae_weights.safetensors"

MAX_CONFIG_BYTES = 1 << 20
HASH_CHUNK_BYTES = 1 << 22
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def detect(folder: Path) -> bool:
    return (folder / "cfg.json").is_file() and (folder / "sae_weights.safetensors").is_file()


def load(folder: Path) -> SAE:
    config_bytes = _read_config(folder / "cfg.json")
    config = json.loads(config_bytes)
    metadata = config.get("metadata") or {}
    architecture = _choice(folder, config, "architecture", get_args(Architecture))
    _choice(folder, config, "normalize_activations", ("none",))
    if config.get("reshape_activations", "none") != "none":
        raise SAEFormatError(f"{folder}: reshape_activations={config['reshape_activations']!r} is not supported")
    d_in, d_sae = _count(folder, config, "d_in"), _count(folder, config, "d_sae")
    k = None
    if architecture == "topk":
        k = _count(folder, config, "k")
        if k > d_sae:
            raise SAEFormatError(f"{folder}: k={k} is larger than d_sae={d_sae}")
    hook_name = metadata.get("hook_name")
    if not isinstance(hook_name, str):
        raise SAEFormatError(f"{folder}: cfg.json has no metadata.hook_name, so the layer is unknown")
    try:
        hook_point = HookPoint.parse(hook_name)
    except ValueError as error:
        raise SAEFormatError(f"{folder}: {error}") from None
    ours = metadata.get("steer_server") or {}
    weights = folder / "sae_weights.safetensors"
    return SAE(
        name=str(ours.get("name", folder.name)),
        architecture=cast(Architecture, architecture),
        d_in=d_in,
        d_sae=d_sae,
        hook_point=hook_point,
        k=k,
        model_name=metadata.get("model_name"),
        skip_first=int(ours.get("skip_first", 0)),
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
        rescale_acts_by_decoder_norm=architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm", False)),
        weights=weights,
        sha256=_check_and_hash(weights, config_bytes, d_in, d_sae, architecture),
    )


def _read_config(path: Path) -> bytes:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise SAEFormatError(f"{path}: {path.stat().st_size} bytes; a cfg.json has at most {MAX_CONFIG_BYTES}")
    data = path.read_bytes()
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SAEFormatError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("metadata") or {}, dict):
        raise SAEFormatError(f"{path}: not a SAELens 6 configuration (an object with an object `metadata`)")
    return data


def _choice(folder: Path, config: dict[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise SAEFormatError(f"{folder}: {key}={value!r} is not supported; supported: {', '.join(allowed)}")
    return cast(str, value)


def _count(folder: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SAEFormatError(f"{folder}: {key} must be a positive integer, got {value!r}")
    return value


def _check_and_hash(weights: Path, config_bytes: bytes, d_in: int, d_sae: int, architecture: str) -> str:
    """Shapes, dtypes and finiteness of every tensor; then SHA-256 of configuration and weights."""
    expected = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_enc": [d_sae], "b_dec": [d_in]}
    if architecture == "jumprelu":
        expected["threshold"] = [d_sae]
    try:
        with safe_open(weights, framework="pt") as file:
            names = set(file.keys())
            for name, shape in expected.items():
                if name not in names:
                    raise SAEFormatError(f"{weights}: tensor {name} is missing; found: {', '.join(sorted(names))}")
                view = file.get_slice(name)
                if view.get_shape() != shape:
                    raise SAEFormatError(f"{weights}: {name} has shape {view.get_shape()}, cfg.json asks for {shape}")
                if view.get_dtype() not in FLOATS:
                    raise SAEFormatError(
                        f"{weights}: {name} has dtype {view.get_dtype()}; supported: {', '.join(FLOATS)}"
                    )
                rows_at_once = max(1, HASH_CHUNK_BYTES // (4 * math.prod(shape[1:])))
                for first in range(0, shape[0], rows_at_once):
                    if not torch.isfinite(view[first : first + rows_at_once]).all():
                        raise SAEFormatError(f"{weights}: {name} holds values that are not finite")
    except SafetensorError as error:
        raise SAEFormatError(f"{weights}: not a readable safetensors file: {error}") from None
    digest = hashlib.sha256(config_bytes)
    with weights.open("rb") as file_bytes:
        while chunk := file_bytes.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
