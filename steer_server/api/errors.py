"""Errors in OpenAI's shape."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse

from steer_server.engine.vllm_compat.errors import SteeringRequestError
from steer_server.spec import SteeringError

TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    409: "ConflictError",
    411: "LengthRequiredError",
    413: "PayloadTooLargeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


def error_response(error: SteeringError) -> JSONResponse:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    content = {"message": error.message, "type": TYPES[error.status], "param": error.param, "code": error.status}
    return JSONResponse({"error": content}, status_code=error.status, headers=headers)


async def handle_steering_error(request: Request, exception: Exception) -> JSONResponse:
    assert isinstance(exception, SteeringRequestError)
    return error_response(exception.error)
