"""Seam: the OpenAI handlers. Steering is admitted before they run, the receipt attached to what they return."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from steer_server.engine.admission import AdmittedSteering
from steer_server.engine.vllm_compat.patching import when_imported, wrap

HANDLERS = {
    "vllm.entrypoints.openai.chat_completion.serving": ("OpenAIServingChat", "create_chat_completion"),
    "vllm.entrypoints.openai.completion.serving": ("OpenAIServingCompletion", "create_completion"),
    "vllm.entrypoints.openai.responses.serving": ("OpenAIServingResponses", "create_responses"),
}

AdmitRequest = Callable[[Any, Any, Any], AdmittedSteering | None]
"""(input processor, request, HTTP request or None) -> what was admitted, left in the request's `vllm_xargs`."""

AttachReceipt = Callable[[Any, AdmittedSteering], Any]
"""(what the handler returned, what was admitted) -> the same with the receipt."""


def install(admit_request: AdmitRequest, attach_receipt: AttachReceipt) -> None:
    async def serve(original: Any, self: Any, request: Any, raw_request: Any = None) -> Any:
        admitted = admit_request(self.engine_client.input_processor, request, raw_request)
        result = await original(self, request, raw_request)
        return result if admitted is None else attach_receipt(result, admitted)

    for module, (handler, method) in HANDLERS.items():
        when_imported(module, partial(_install_handler, handler=handler, method=method, serve=serve))


def _install_handler(module: ModuleType, handler: str, method: str, serve: Callable[..., Any]) -> None:
    wrap(getattr(module, handler), method, ("request", "raw_request"), serve)
