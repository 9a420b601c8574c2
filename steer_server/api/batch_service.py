"""The server's batches: opened with it, and asked for by routes."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request

from sae_models.cache import cache_folder
from steer_server.batch.engines import LocalEngine
from steer_server.batch.model_files import model_facts
from steer_server.batch.service import BatchService
from steer_server.batch.store import BatchStore
from steer_server.engine.vllm_compat.serving_app import api_key
from steer_server.spec import SteeringError

_log = logging.getLogger(__name__)
_starting: set[asyncio.Task[None]] = set()


def start_batches(app: FastAPI, args: Namespace) -> BatchService | None:
    """The service on the application's own routes; None where nothing can be stored.

    It takes up batches that were begun before as soon as the application serves.
    """
    folder = cache_folder() / "batches"
    try:
        store = BatchStore(folder)
    except (OSError, sqlite3.Error) as error:
        _log.warning("/v1/files and /v1/batches are off: %s cannot be written: %s", folder, error)
        return None
    key = api_key(args)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    config = app.state.vllm_config
    model = model_facts(config.model_config.model)
    engine = LocalEngine(app, model, config.scheduler_config.max_num_seqs, headers)
    service = BatchService(store, engine)
    task = asyncio.create_task(_start(service, app))
    # The loop itself keeps no reference.
    _starting.add(task)
    task.add_done_callback(_starting.discard)
    return service


async def _start(service: BatchService, app: FastAPI) -> None:
    # vLLM sets it when the application is complete; a request before that would build it half.
    while not hasattr(app.state, "server"):
        await asyncio.sleep(0.05)
    await service.start()


def service_of(request: Request) -> BatchService:
    """Raises SteeringError where the server keeps no batches."""
    service: Any = request.app.state.steering_batches
    if service is None:
        raise SteeringError("this server cannot store files: its cache folder cannot be written", "file", status=503)
    assert isinstance(service, BatchService)
    return service
