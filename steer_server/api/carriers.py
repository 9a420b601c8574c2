"""Where a request body may carry steering."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from steer_server.engine.admission import AdmittedSteering
from steer_server.engine.vllm_compat.errors import SteeringRequestError
from steer_server.engine.vllm_compat.frontend import admit
from steer_server.spec import SteeringError

FIELD = "steering"

admitted_fingerprint: ContextVar[list[str] | None] = ContextVar("admitted_fingerprint", default=None)
"""Set by the middleware to a list that admission appends to: tasks of the request share it, other requests do not."""


def carried(body: Any) -> tuple[object, str] | None:
    """(steering, the field that carried it) of a decoded JSON object, or None.

    `extra_body` is what OpenAI's SDK merges into the body; some gateways send it on as a literal key.
    Raises SteeringError where more than one field carries steering.
    """
    found = []
    for holder, root in (
        (body, FIELD),
        (body.get("vllm_xargs"), f"vllm_xargs.{FIELD}"),
        (body.get("extra_body"), f"extra_body.{FIELD}"),
    ):
        if isinstance(holder, dict) and holder.get(FIELD) is not None:
            found.append((holder[FIELD], root))
    if len(found) > 1:
        raise SteeringError(f"steering is given both in {found[0][1]} and in {found[1][1]}", found[1][1])
    return found[0] if found else None


def admit_request(input_processor: Any, request: Any, http_request: Any) -> AdmittedSteering | None:
    """Admit what a chat, completion or responses request carries and leave it where vLLM passes it on.

    request: the body as vLLM's model. http_request: the Starlette request; None outside of a server.
    Raises vLLM's form of SteeringError before anything is sent to the engine or the client.
    """
    extra = request.model_extra or {}
    try:
        found = carried({**extra, "vllm_xargs": request.vllm_xargs})
        if found is None:
            return None
        value, root = found
        _refuse_unsupported(request, http_request, root)
        if root.startswith("vllm_xargs") and not isinstance(value, str):
            raise SteeringError(f"{root} must be a JSON string, got {type(value).__name__}", root)
    except SteeringError as error:
        raise SteeringRequestError(error) from error
    admitted = admit(input_processor, value, getattr(request, "n", None) or 1, root)
    request.vllm_xargs = {**(request.vllm_xargs or {}), FIELD: admitted}
    fingerprints = admitted_fingerprint.get()
    if fingerprints is not None:
        fingerprints.append(admitted.plan.fingerprint)
    return admitted


def _refuse_unsupported(request: Any, http_request: Any, root: str) -> None:
    # Other front ends than vLLM's, such as Ray Serve's, hand over a request that belongs to no application.
    state = None if http_request is None else getattr(http_request.scope.get("app"), "state", None)
    if http_request is not None and not getattr(state, "steering", None):
        raise SteeringError(
            "this server was started without Steer Server's HTTP side: name steer_server in VLLM_PLUGINS", root
        )
    if getattr(request, "use_beam_search", False):
        raise SteeringError("steering with beam search is not supported by this version", root)
    if getattr(request, "background", False):
        raise SteeringError("steering of background responses is not supported by this version", root)
