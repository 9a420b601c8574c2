"""Seam: a loaded model's hook points, armed, for either of vLLM's model runners.

A runner of either version has what it serves as `armed`: an ArmedModel, or None where nothing is steered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.logger import init_logger

from sae_models import HookPoint
from steer_server.engine.vllm_compat.decoder_layers import Place, find_decoder_layers, find_places
from steer_server.engine.vllm_compat.engine_config import steering_config
from steer_server.engine.vllm_compat.engine_core import wire_plan
from steer_server.engine.vllm_compat.pipeline import sites_elsewhere
from steer_server.engine.worker import WorkerSteering
from steer_server.plan import decode_plan

# Under "vllm", whose handlers print in the engine's processes.
logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class ArmedModel:
    """A worker's steering, and where in the model its sites are, in their order."""

    steering: WorkerSteering
    places: list[Place]

    def add_request(self, new: Any) -> None:
        """Take in a request as the scheduler first sends it. new: vLLM's NewRequestData."""
        encoded = wire_plan(new.sampling_params)
        if encoded is not None:
            self.steering.add_request(new.req_id, decode_plan(encoded), new.prompt_len)


def arm(vllm_config: Any, model: torch.nn.Module, device: torch.device) -> ArmedModel | None:
    """Arm a model that has its weights and has not run yet. None for an engine that nothing steers.

    Called while the model loads, so that the row bank is part of what vLLM finds in use when it sizes the KV cache.
    Raises ArmError.
    """
    config = steering_config(vllm_config)
    if config is None:
        return None
    layers = find_decoder_layers(model, config.n_layers)
    elsewhere = sites_elsewhere(config.sites, layers)
    config = replace(config, sites=tuple(site for site in config.sites if site not in elsewhere))
    points = [HookPoint.parse(site) for site in config.sites]
    places = find_places(layers, points, config.d_model)
    for site, place in enumerate(places):
        place.arm(site)
    steering = WorkerSteering(config, vllm_config.model_config.dtype, device, elsewhere)
    others = [str(point) for point in points if point.kind != "resid_post"]
    logger.info(
        "Steering: %d of %d decoder layers armed%s; %d SAE(s): %s; row bank of %d rows (%d edits a request), %.1f MiB",
        len(points) - len(others),
        config.n_layers,
        "" if not others else f", and {', '.join(others)}",
        len(config.saes),
        ", ".join(name for name, _ in config.saes) or "none",
        config.rows,
        config.max_edits,
        steering.nbytes / 2**20,
    )
    return ArmedModel(steering, places)
