"""Seam: our errors as vLLM's, so that they cross its layers and reach the client as they are."""

from __future__ import annotations

from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from steer_server.engine.admission import NotAppliedError
from steer_server.spec import SteeringError


class SteeringRequestError(VLLMValidationError, ValueError):
    """A SteeringError on its way through vLLM, which lets its own validation errors pass and wraps all others.

    Where our HTTP handler is not installed, vLLM makes it a 400 with the right `param`.
    """

    def __init__(self, error: SteeringError) -> None:
        VLLMValidationError.__init__(self, error.message, parameter=error.param)
        self.error = error

    def __str__(self) -> str:
        return self.error.message


class SteeringNotAppliedError(GracefulHTTPError):
    """A NotAppliedError on its way through vLLM: the request fails with a 500, the engine lives on."""

    def __init__(self, error: NotAppliedError) -> None:
        super().__init__(str(error), HTTPStatus.INTERNAL_SERVER_ERROR)
