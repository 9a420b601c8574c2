"""`/v1/files`: what batches read and write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from steer_server.api.batch_service import service_of
from steer_server.api.errors import error_response
from steer_server.batch.store import MAX_FILE_BYTES, MAX_STORED_BYTES, BatchStore, NotStoredError, now
from steer_server.spec import SteeringError

router = APIRouter(prefix="/v1/files", tags=["batch"])

MAX_NAME = 255
MIN_SECONDS, MAX_SECONDS = 3600, 2_592_000
_PIECE = 1 << 20
_FORM_ROOM = 1 << 16


def store_of(request: Request) -> BatchStore:
    """Raises SteeringError."""
    return service_of(request).store


def not_found(what: str, identifier: str, param: str) -> SteeringError:
    return SteeringError(f"no {what} {identifier[:80]!r}", param, status=404)


@router.post("")
async def upload_file(request: Request) -> Any:
    """Keep a file of batch lines. A form with `file`, `purpose` (batch) and, if it is to expire, `expires_after`."""
    try:
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise SteeringError("a Content-Length header is required", "file", status=411)
        if int(length) > MAX_FILE_BYTES + _FORM_ROOM:
            raise SteeringError(f"file has {length} bytes; allowed are {MAX_FILE_BYTES}", "file", status=413)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise SteeringError("files are uploaded as multipart/form-data", "file")
        store = store_of(request)
        if await run_in_threadpool(store.stored_bytes) + int(length) > MAX_STORED_BYTES:
            raise SteeringError(f"files may have {MAX_STORED_BYTES} bytes together; delete some", "file", status=413)
        async with request.form(max_files=1, max_fields=8) as form:
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise SteeringError("file is required", "file")
            if form.get("purpose") != "batch":
                raise SteeringError(f"purpose must be 'batch', got {str(form.get('purpose'))[:80]!r}", "purpose")
            name = Path(upload.filename or "upload.jsonl").name[:MAX_NAME]
            if name.endswith((".gz", ".parquet", ".pq")):
                raise SteeringError("file must be JSON lines, neither compressed nor Parquet", "file")
            expires_at = _expires_at(dict(form))
            scratch = store.scratch_path()
            try:
                with scratch.open("wb") as file:
                    while piece := await upload.read(_PIECE):
                        await run_in_threadpool(file.write, piece)
                    file.flush()
                    await run_in_threadpool(os.fsync, file.fileno())
                return await run_in_threadpool(store.add_file, scratch, name, "batch", expires_at)
            finally:
                scratch.unlink(missing_ok=True)
    except SteeringError as error:
        return error_response(error)


def _expires_at(form: dict[str, Any]) -> int | None:
    """SDKs send `expires_after[seconds]`; as one field it may be a JSON object."""
    given: dict[str, Any] = {}
    for part in ("anchor", "seconds"):
        if f"expires_after[{part}]" in form:
            given[part] = form[f"expires_after[{part}]"]
    if "expires_after" in form:
        try:
            given = dict(json.loads(str(form["expires_after"])))
        except (ValueError, TypeError):
            raise SteeringError("expires_after must be an object", "expires_after") from None
    return None if not given else now() + seconds_of(given, "expires_after", "created_at")


def seconds_of(given: Any, field: str, anchor: str) -> int:
    """Seconds of an `expires_after` object. Raises SteeringError."""
    if not isinstance(given, dict) or given.get("anchor") != anchor:
        raise SteeringError(f"{field}.anchor must be {anchor!r}", f"{field}.anchor")
    seconds = given.get("seconds")
    if not str(seconds).isdecimal() or not MIN_SECONDS <= int(str(seconds)) <= MAX_SECONDS:
        allowed = f"{MIN_SECONDS} to {MAX_SECONDS}"
        raise SteeringError(f"{field}.seconds must be {allowed}, got {str(seconds)[:80]!r}", f"{field}.seconds")
    return int(str(seconds))


@router.get("")
def list_files(
    request: Request,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Any:
    """Files that have not expired."""
    try:
        found = store_of(request).files(purpose, after, limit, order)
    except NotStoredError:
        return error_response(not_found("file", str(after), "after"))
    except SteeringError as error:
        return error_response(error)
    return page(found, limit)


def page(found: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's list of what was found, of which there may be one more than `limit`."""
    data = found[:limit]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(found) > limit}


@router.get("/{file_id}")
def get_file(request: Request, file_id: str) -> Any:
    """What is known of a file."""
    try:
        return store_of(request).file(file_id)
    except NotStoredError:
        return error_response(not_found("file", file_id, "file_id"))
    except SteeringError as error:
        return error_response(error)


@router.get("/{file_id}/content")
def get_content(request: Request, file_id: str) -> Any:
    """What a file holds."""
    try:
        store = store_of(request)
        store.file(file_id)
        return FileResponse(store.file_path(file_id), media_type="application/jsonl")
    except NotStoredError:
        return error_response(not_found("file", file_id, "file_id"))
    except SteeringError as error:
        return error_response(error)


@router.delete("/{file_id}")
def delete_file(request: Request, file_id: str) -> Any:
    """Delete a file. A batch that still reads it fails."""
    try:
        store_of(request).delete_file(file_id)
    except NotStoredError:
        return error_response(not_found("file", file_id, "file_id"))
    except SteeringError as error:
        return error_response(error)
    return {"id": file_id, "object": "file", "deleted": True}
