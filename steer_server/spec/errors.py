"""The one error that a client's steering can cause."""

from __future__ import annotations


class SteeringError(ValueError):
    """A request that cannot be steered as asked.

    message: for people; names the value and what is allowed.
    param: the JSON path of the offending field, such as `steering.features[0].index`.
    status: the HTTP status it becomes: 400, 404 (a name this server does not know), 429 (no room now) or
        503 (a file that the server needs cannot be read any more).
    retry_after: seconds, with 429.
    """

    def __init__(self, message: str, param: str, status: int = 400, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[SteeringError], tuple[str, str, int, int | None]]:
        return type(self), (self.message, self.param, self.status, self.retry_after)
