"""`/v1/batches`: files of requests, answered by this server in its own time."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool

from steer_server.api.batch_service import service_of
from steer_server.api.errors import error_response
from steer_server.api.files import not_found, page, seconds_of
from steer_server.batch.rows import URLS
from steer_server.batch.store import OPEN, NotStoredError, now
from steer_server.spec import SteeringError

router = APIRouter(prefix="/v1/batches", tags=["batch"])

DAY = 86_400
MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512
FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after")


@router.post("")
async def create_batch(request: Request) -> Any:
    """Begin a batch on a file that was uploaded."""
    try:
        service = service_of(request)
        body = await _body(request)
        if service.engine_facts is None:
            raise SteeringError("the server is still starting", "input_file_id", status=503, retry_after=1)
        try:
            source = await run_in_threadpool(service.store.file, str(body["input_file_id"]))
        except NotStoredError:
            raise not_found("file", str(body["input_file_id"]), "input_file_id") from None
        if source["purpose"] != "batch":
            raise SteeringError(f"input_file_id names a file of purpose {source['purpose']!r}", "input_file_id")
        batch = await run_in_threadpool(service.store.add_batch, _opened(body), service.engine_facts)
    except SteeringError as error:
        return error_response(error)
    service.submit(batch["id"])
    return batch


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        raise SteeringError("the body must be a JSON object", "body") from None
    if not isinstance(body, dict):
        raise SteeringError("the body must be a JSON object", "body")
    for name in body:
        if name not in FIELDS:
            raise SteeringError(f"{name[:80]} is not a known key. Allowed: {', '.join(FIELDS)}", name[:80])
    if not isinstance(body.get("input_file_id"), str):
        raise SteeringError("input_file_id must be the id of a file", "input_file_id")
    if body.get("endpoint") not in URLS:
        raise SteeringError(f"endpoint must be one of {', '.join(URLS)}", "endpoint")
    if body.get("completion_window") != "24h":
        raise SteeringError("completion_window must be '24h'", "completion_window")
    _check_metadata(body.get("metadata"))
    if body.get("output_expires_after") is not None:
        seconds_of(body["output_expires_after"], "output_expires_after", "created_at")
    return body


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA:
        raise SteeringError(f"metadata must be an object with up to {MAX_METADATA} keys", "metadata")
    for key, value in metadata.items():
        if len(key) > MAX_KEY or not isinstance(value, str) or len(value) > MAX_VALUE:
            allowed = f"keys have up to {MAX_KEY} characters, values are texts of up to {MAX_VALUE}"
            raise SteeringError(f"metadata: {allowed}; got {key[:MAX_KEY]!r}", "metadata")


def _opened(body: dict[str, Any]) -> dict[str, Any]:
    created = now()
    never = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "endpoint": body["endpoint"],
        "errors": None,
        "input_file_id": body["input_file_id"],
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": created,
        "expires_at": created + DAY,
        **{f"{state}_at": None for state in never},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.get("metadata"),
        "output_expires_after": body.get("output_expires_after"),
    }


@router.get("")
def list_batches(request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Any:
    """Batches, newest first."""
    try:
        return page(service_of(request).store.batches(after, limit), limit)
    except NotStoredError:
        return error_response(not_found("batch", str(after), "after"))
    except SteeringError as error:
        return error_response(error)


@router.get("/{batch_id}")
def get_batch(request: Request, batch_id: str) -> Any:
    """How far a batch is."""
    try:
        return service_of(request).store.batch(batch_id)
    except NotStoredError:
        return error_response(not_found("batch", batch_id, "batch_id"))
    except SteeringError as error:
        return error_response(error)


@router.post("/{batch_id}/cancel")
def cancel_batch(request: Request, batch_id: str) -> Any:
    """Stop a batch; what it has answered stays in its output file."""
    try:
        batch = service_of(request).store.update_batch(
            batch_id, ("validating", "in_progress"), status="cancelling", cancelling_at=now()
        )
    except NotStoredError:
        return error_response(not_found("batch", batch_id, "batch_id"))
    except SteeringError as error:
        return error_response(error)
    if batch["status"] not in OPEN:
        return error_response(SteeringError(f"the batch is {batch['status']} already", "batch_id", status=409))
    return batch
