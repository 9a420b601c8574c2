"""What a job is: kept beside its output, so that only the same job goes on with it."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_server.batch.row_file import write_whole

VERSION = 1
MAX_SHOWN = 120


class JobError(RuntimeError):
    """A job that cannot run, or that cannot be resumed; the message says why."""


@dataclass(frozen=True)
class Job:
    """identifier: random; part of the `id` of each result line. facts: JSON-able, what must be the same on resuming."""

    identifier: str
    facts: dict[str, Any]


def job_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.job.json")


def new_job(facts: dict[str, Any]) -> Job:
    return Job(secrets.token_hex(6), facts)


def save_job(path: Path, job: Job) -> None:
    """Raises JobError."""
    data = {"version": VERSION, "job": job.identifier, "facts": job.facts}
    try:
        write_whole(path, json.dumps(data, indent=1).encode() + b"\n")
    except OSError as failed:
        raise JobError(f"{path} cannot be written: {failed.strerror}") from None


def load_job(path: Path) -> Job:
    """Raises JobError."""
    try:
        data = json.loads(path.read_bytes())
        if data["version"] != VERSION:
            raise JobError(f"{path} was written by another version of Steer Server")
        return Job(str(data["job"]), dict(data["facts"]))
    except FileNotFoundError:
        raise JobError(f"{path} is missing, so nothing says what job wrote the output") from None
    except (OSError, ValueError, KeyError, TypeError) as invalid:
        raise JobError(f"{path} cannot be read: {invalid!r}") from None


def differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """What changed, one line for each fact that did."""
    found: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        old, new, where = before.get(name), now.get(name), f"{path}{name}"
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{where}.")
        else:
            found.append(f"{where} was {_shown(old)}, is {_shown(new)}")
    return found


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
