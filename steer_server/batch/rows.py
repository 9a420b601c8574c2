"""A row of a batch: OpenAI's input line in, OpenAI's result line out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_LINE_BYTES = 64 << 20
MAX_ID_BYTES = 4096

OK = 200


@dataclass(frozen=True, slots=True)
class Request:
    """A row to be answered. number: its place in the job, from 1. body: JSON text, as it stands in the line."""

    number: int
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that no engine needs to see."""

    number: int
    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server answered: the HTTP status and the body, JSON text. retry_after: seconds, where it said so."""

    status: int
    body: bytes
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A finished row.

    line: the result line, with its newline. failure: what kind of failure it was, None where it was answered.
    prompt_tokens, completion_tokens: as the answer counts them. steered_tokens: tokens that the receipt's entry with
    most of them was applied to, computed or from the prefix cache; of an entry with conditions, computed alone.
    """

    number: int
    line: bytes
    failure: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    steered_tokens: int = 0


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Identified(msgspec.Struct):
    custom_id: Any = None


class _Mode(msgspec.Struct):
    stream: Any = None
    background: Any = None


class _Error(msgspec.Struct):
    code: str
    message: str


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _ResultLine(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _Response | None
    error: _Error | None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Applied(msgspec.Struct):
    tokens: int = 0
    cached: int = 0
    closed: int | None = None

    @property
    def steered(self) -> int:
        """Tokens known to be edited: of cached ones nobody knows where conditions decide."""
        return self.tokens + (self.cached if self.closed is None else 0)


class _Receipt(msgspec.Struct):
    applied: list[_Applied] = []


class _Answered(msgspec.Struct):
    usage: _Usage | None = None
    steering: _Receipt | None = None


class _HttpError(msgspec.Struct):
    type: Any = None
    param: Any = None


class _Failed(msgspec.Struct):
    error: Any = None


class FinishedLine(msgspec.Struct):
    """What resuming needs of a result line that was written."""

    class Status(msgspec.Struct):
        status_code: int

    id: str
    response: Status | None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code != OK


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_identified = msgspec.json.Decoder(_Identified).decode
_decode_mode = msgspec.json.Decoder(_Mode).decode
_decode_answered = msgspec.json.Decoder(_Answered).decode
_encode = msgspec.json.Encoder().encode
decode_finished = msgspec.json.Decoder(FinishedLine).decode


def parse_row(number: int, line: bytes, urls: tuple[str, ...] = URLS) -> Request | Refused:
    """The row that a line of the input holds, or why it holds none. urls: those that the job takes."""
    if len(line) > MAX_LINE_BYTES:
        return Refused(number, None, "line_too_long", f"row {number} is longer than {MAX_LINE_BYTES} bytes")
    try:
        decoded = _decode_line(line)
    except msgspec.ValidationError as invalid:
        return Refused(number, _identified(line), "invalid_row", f"row {number}: {_in_words(invalid)}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as invalid:
        return Refused(number, None, "invalid_json", f"row {number} is not JSON: {invalid}")

    def refused(code: str, message: str) -> Refused:
        return Refused(number, decoded.custom_id, code, f"row {number}: {message}")

    if not 1 <= len(decoded.custom_id.encode()) <= MAX_ID_BYTES:
        return Refused(number, None, "invalid_row", f"row {number}: custom_id must have 1 to {MAX_ID_BYTES} bytes")
    if decoded.method != "POST":
        return refused("invalid_method", f"method must be POST, got {decoded.method[:80]!r}")
    if decoded.url not in urls:
        return refused("invalid_url", f"url must be {' or '.join(urls)}, got {decoded.url[:80]!r}")
    body = bytes(decoded.body)
    try:
        mode = _decode_mode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return refused("invalid_row", "body must be an object")
    if mode.stream:
        return refused("not_in_a_batch", "body.stream must be false in a batch")
    if mode.background:
        return refused("not_in_a_batch", "body.background must be false in a batch")
    return Request(number, decoded.custom_id, decoded.url, body)


def _identified(line: bytes) -> str | None:
    """The custom_id of a line that is otherwise wrong."""
    try:
        custom_id = _decode_identified(line).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return custom_id if isinstance(custom_id, str) and len(custom_id.encode()) <= MAX_ID_BYTES else None


def _in_words(invalid: msgspec.ValidationError) -> str:
    text = str(invalid)
    missing = re.fullmatch(r"Object missing required field `(\w+)`", text)
    if missing is not None:
        return f"{missing[1]} is required"
    wrong = re.fullmatch(r"Expected `(\w+)`, got `(\w+)` - at `\$\.(\w+)`", text)
    if wrong is not None:
        return f"{wrong[3]} must be a string, got {wrong[2]}"
    return "must be an object with custom_id, method, url and body"


def row_id(job: str, number: int) -> str:
    """The `id` of a result line; resuming reads from it which row is finished."""
    return f"batch_req_{job}_{number}"


def row_number(job: str, identifier: str) -> int | None:
    """The number in a result line's `id`, None where it is not of this job."""
    prefix = f"batch_req_{job}_"
    digits = identifier.removeprefix(prefix)
    return int(digits) if identifier.startswith(prefix) and digits.isdecimal() else None


def refused_result(job: str, row: Refused) -> Result:
    line = _ResultLine(row_id(job, row.number), row.custom_id, None, _Error(row.code, row.message))
    return Result(row.number, _encode(line) + b"\n", row.code)


def answered_result(job: str, row: Request, answer: Answer) -> Result:
    """The result of a row that the server answered, well or with an error."""
    identifier = row_id(job, row.number)
    body = answer.body
    try:
        answered = _decode_answered(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        answered = _Answered()
        # An error's body has another shape; what is no JSON at all (a gateway's page) becomes a JSON string.
        if not _is_json(body):
            body = _encode(body.decode(errors="replace"))
    if b"\n" in body or b"\r" in body:
        body = msgspec.json.format(body, indent=-1)
    response = _Response(answer.status, identifier, msgspec.Raw(body))
    line = _encode(_ResultLine(identifier, row.custom_id, response, None)) + b"\n"
    if answer.status != OK:
        return Result(row.number, line, failure_kind(answer))
    usage = answered.usage or _Usage()
    applied = answered.steering.applied if answered.steering is not None else []
    return Result(
        row.number,
        line,
        None,
        usage.prompt_tokens or usage.input_tokens,
        usage.completion_tokens or usage.output_tokens,
        max((entry.steered for entry in applied), default=0),
    )


def _is_json(body: bytes) -> bool:
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def failure_kind(answer: Answer) -> str:
    """Status and type of an error and the field it names, without the numbers that would make each of a kind."""
    try:
        failed = msgspec.json.decode(answer.body, type=_Failed)
        error = msgspec.convert(failed.error, _HttpError)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
        return str(answer.status)
    parts = [str(answer.status), *(part for part in (error.type, error.param) if isinstance(part, str))]
    return re.sub(r"\[\d+\]", "[]", " ".join(parts))[:200]
