"""Result lines as Parquet: as they are, or tidy, one row for each choice under each setting."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet

from steer_server.batch.row_file import RowFileError, sync_folder
from steer_server.batch.rows import OK, row_number
from steer_server.batch.sweep import Sweep, shown, suffix

GROUP = 1024
RESULT_SCHEMA = pa.schema(
    [("id", pa.string()), ("custom_id", pa.string()), ("response", pa.string()), ("error", pa.string())]
)


class _Line(msgspec.Struct):
    id: str
    custom_id: str | None
    response: msgspec.Raw
    error: msgspec.Raw


class _Response(msgspec.Struct):
    status_code: int
    body: Any


_decode = msgspec.json.Decoder(_Line).decode
_NULL = b"null"


def write_results(path: Path, lines: Iterable[bytes]) -> None:
    """The four fields of each line; `response` and `error` as JSON text. At once or not at all. Raises RowFileError."""

    def as_row(line: bytes) -> dict[str, str | None]:
        decoded = _decode(line)
        return {
            "id": decoded.id,
            "custom_id": decoded.custom_id,
            "response": _text(decoded.response),
            "error": _text(decoded.error),
        }

    _write(path, RESULT_SCHEMA, (as_row(line) for line in lines))


def write_tidy(path: Path, lines: Iterable[bytes], job: str, sweep: Sweep) -> None:
    """One row for each choice of each prompt under each setting. At once or not at all. Raises RowFileError.

    A column for each swept parameter, named as it was on the command line: a number, a truth value or text, JSON text
    where its values are of several kinds.
    """
    parameters = [(name, _column_type(values)) for name, values in zip(sweep.names, sweep.values, strict=True)]
    schema = pa.schema(
        [
            ("custom_id", pa.string()),
            *parameters,
            ("choice", pa.int32()),
            ("text", pa.string()),
            ("prompt_tokens", pa.int64()),
            ("completion_tokens", pa.int64()),
            ("finish_reason", pa.string()),
            ("error", pa.string()),
            ("receipt", pa.string()),
            ("id", pa.string()),
        ]
    )

    def rows() -> Iterator[dict[str, Any]]:
        for line in lines:
            decoded = _decode(line)
            setting = sweep.setting(((row_number(job, decoded.id) or 1) - 1) % sweep.count)
            custom_id = decoded.custom_id
            common: dict[str, Any] = {
                "id": decoded.id,
                "custom_id": custom_id.removesuffix(suffix(setting)) if custom_id is not None else None,
                **{name: _cell(setting[name], kind) for name, kind in parameters},
            }
            for outcome in _outcomes(decoded):
                yield common | outcome

    _write(path, schema, rows())


def _outcomes(line: _Line) -> list[dict[str, Any]]:
    """What a row gave: one for each choice, or the one error."""
    if bytes(line.response) == _NULL:
        return [{"error": msgspec.json.decode(line.error)["message"]}]
    response = msgspec.json.decode(line.response, type=_Response)
    body = response.body
    if response.status_code != OK:
        failure = body.get("error") if isinstance(body, dict) else None
        message = failure.get("message") if isinstance(failure, dict) else None
        return [{"error": message or f"status {response.status_code}"}]
    usage, receipt = body.get("usage") or {}, body.get("steering")
    common = {
        "prompt_tokens": usage.get("prompt_tokens", usage.get("input_tokens")),
        "completion_tokens": usage.get("completion_tokens", usage.get("output_tokens")),
        "receipt": None if receipt is None else msgspec.json.encode(receipt).decode(),
    }
    if "choices" in body:
        return [
            {
                **common,
                "choice": choice["index"],
                "text": choice["message"]["content"] if "message" in choice else choice["text"],
                "finish_reason": choice["finish_reason"],
            }
            for choice in body["choices"]
        ]
    text = "".join(
        part.get("text", "") for item in body.get("output") or [] for part in item.get("content") or [] if part
    )
    reason = (body.get("incomplete_details") or {}).get("reason") or body.get("status")
    return [{**common, "choice": 0, "text": text, "finish_reason": reason}]


def _text(raw: msgspec.Raw) -> str | None:
    return None if bytes(raw) == _NULL else bytes(raw).decode()


def _column_type(values: tuple[Any, ...]) -> pa.DataType:
    if all(isinstance(value, bool) for value in values):
        return pa.bool_()
    if all(isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62 for value in values):
        return pa.int64()
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return pa.float64()
    return pa.string()


def _cell(value: Any, kind: pa.DataType) -> Any:
    if kind == pa.string():
        return shown(value)
    return float(value) if kind == pa.float64() else value


def _write(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> None:
    aside = path.with_name(f".{path.name}.new")
    try:
        with aside.open("wb") as file:
            with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
                group: list[dict[str, Any]] = []
                for row in rows:
                    group.append(row)
                    if len(group) == GROUP:
                        writer.write_table(pa.Table.from_pylist(group, schema))
                        group = []
                writer.write_table(pa.Table.from_pylist(group, schema))
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        sync_folder(path.parent)
    except OSError as failed:
        aside.unlink(missing_ok=True)
        raise RowFileError(f"{path} cannot be written: {failed.strerror or failed}; --resume writes it") from None
