"""Sweeps: every row under every combination of settings of its `steering` object."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from steer_server.batch.rows import Refused, Request

MAX_SETTINGS = 100_000
FIELD = "steering"
STRENGTH = "strength"
"""Stands for the strength of every preset and of every vector that has one."""


class SweepError(ValueError):
    """A sweep that cannot be read."""


@dataclass(frozen=True)
class Sweep:
    """names: paths into `steering`. values: of each, those it takes."""

    names: tuple[str, ...] = ()
    values: tuple[tuple[Any, ...], ...] = ()

    @property
    def count(self) -> int:
        return math.prod(len(values) for values in self.values)

    def setting(self, index: int) -> dict[str, Any]:
        """The index-th combination, the last parameter changing fastest."""
        chosen: dict[str, Any] = {}
        for name, values in zip(reversed(self.names), reversed(self.values), strict=True):
            index, place = divmod(index, len(values))
            chosen[name] = values[place]
        return dict(reversed(chosen.items()))

    def as_json(self) -> dict[str, list[Any]]:
        return {name: list(values) for name, values in zip(self.names, self.values, strict=True)}


def parse_sweep(texts: Sequence[str]) -> Sweep:
    """From `path=value,value,...`; values are JSON where they can be read as that, else text. Raises SweepError."""
    names: list[str] = []
    values: list[tuple[Any, ...]] = []
    for text in texts:
        name, separator, listed = text.partition("=")
        if not separator or not name or not listed or not all(name.split(".")):
            raise SweepError(f"{text!r} is not PATH=VALUE,VALUE,..., such as features.0.index=12,77")
        if name in names:
            raise SweepError(f"{name!r} is swept twice")
        parsed = json.loads(listed) if _is_json_list(listed) else [_value(part) for part in listed.split(",")]
        if len({shown(value) for value in parsed}) < len(parsed):
            raise SweepError(f"{text!r} has a value twice")
        names.append(name)
        values.append(tuple(parsed))
    sweep = Sweep(tuple(names), tuple(values))
    if not 1 <= sweep.count <= MAX_SETTINGS:
        raise SweepError(f"the sweep has {sweep.count} combinations; allowed are 1 to {MAX_SETTINGS}")
    return sweep


def _is_json_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value


def swept(row: Request, sweep: Sweep, first_number: int) -> list[Request | Refused]:
    """The row under each setting, numbered from `first_number`.

    They stand side by side: where the steering leaves the prompt alone, or is the same, they share the prefix cache.
    """
    body = msgspec.json.decode(row.body)
    rows: list[Request | Refused] = []
    for index in range(sweep.count):
        setting = sweep.setting(index)
        custom_id = row.custom_id + suffix(setting)
        number = first_number + index
        try:
            changed = dict(body)
            steering = _copied(changed.get(FIELD) or {})
            for name, value in setting.items():
                _set(steering, name, value)
            changed[FIELD] = steering
            rows.append(Request(number, custom_id, row.url, msgspec.json.encode(changed)))
        except SweepError as error:
            rows.append(Refused(number, custom_id, "invalid_sweep", f"row {number}: {error}"))
    return rows


def suffix(setting: dict[str, Any]) -> str:
    """What a setting adds to a row's custom_id."""
    return "".join(f"|{name}={shown(value)}" for name, value in setting.items())


def shown(value: Any) -> str:
    """A swept value as text: JSON, text as it is."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _copied(steering: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(steering))


def _set(steering: Any, path: str, value: Any) -> None:
    if path == STRENGTH:
        _set_strength(steering, value)
        return
    parts = path.split(".")
    holder = steering
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        place = ".".join([FIELD, *parts[:i]])
        if isinstance(holder, list):
            if not part.isdecimal() or int(part) > len(holder):
                raise SweepError(f"{place} has {len(holder)} entries; {part!r} is not one of them, nor the next")
            if int(part) == len(holder):
                holder.append({})
            key: Any = int(part)
        elif isinstance(holder, dict):
            key = part
            if not last and holder.get(key) is None:
                # The lists of a spec are named at its top; what follows their names is an index.
                holder[key] = [] if parts[i + 1].isdecimal() else {}
        else:
            raise SweepError(f"{place} holds no {part!r}")
        if last:
            holder[key] = value
        else:
            holder = holder[key]


def _set_strength(steering: Any, value: Any) -> None:
    entries = [
        entry
        for kind in ("presets", "vectors")
        for entry in (steering.get(kind) or [] if isinstance(steering, dict) else [])
        if isinstance(entry, dict) and entry.get("op", "add") in ("add", "scale_along")
    ]
    if not entries:
        raise SweepError(f"{FIELD} has no preset and no vector with a strength; name a field, such as features.0.value")
    for entry in entries:
        entry[STRENGTH] = value
