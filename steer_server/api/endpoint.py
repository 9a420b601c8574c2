"""Steer Server's side of vLLM's endpoint plugin contract."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.datastructures import State

from steer_server.api.batch_service import start_batches
from steer_server.api.batches import router as batches_router
from steer_server.api.capabilities import capabilities
from steer_server.api.errors import handle_steering_error
from steer_server.api.features import open_stores
from steer_server.api.features import router as features_router
from steer_server.api.files import router as files_router
from steer_server.api.middleware import SteeringMiddleware
from steer_server.engine.vllm_compat.errors import SteeringRequestError
from steer_server.engine.vllm_compat.frontend import admission_of

router = APIRouter(prefix="/v1/steering", tags=["steering"])
router.include_router(features_router)


@router.get("/capabilities")
async def get_capabilities(request: Request) -> dict[str, Any]:
    """What this server can steer, with what, and within which limits."""
    described: dict[str, Any] = request.app.state.steering
    return described


class SteeringEndpoint:
    """Routes, error handling and the refusal of steering where it cannot be carried."""

    name = "steer_server"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        self._app = app
        for included in (router, files_router, batches_router):
            app.include_router(included)
        app.add_middleware(SteeringMiddleware)
        app.add_exception_handler(SteeringRequestError, handle_steering_error)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        if engine_client is None:
            raise RuntimeError("Steer Server needs an engine; take steer_server out of VLLM_PLUGINS")
        admission = admission_of(engine_client.input_processor)
        if admission is None:
            raise RuntimeError("the engine was not armed for steering; see its log")
        checks = await engine_client.collective_rpc("steering_self_test")
        served = args.served_model_name
        name = (served[0] if isinstance(served, list) else served) or engine_client.model_config.model
        state.steering_features = open_stores(admission.catalog.saes)
        state.steering = capabilities(name, admission, checks, searchable=state.steering_features.keys())
        # An application that was built to run a batch itself does not take up the server's.
        state.steering_batches = start_batches(self._app, args) if getattr(args, "serves_batches", True) else None
