"""From what a client sent to a SteeringSpec, or an error that names the field."""

from __future__ import annotations

import difflib
import json
from typing import NoReturn, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from steer_server.spec.errors import SteeringError
from steer_server.spec.schema import EntryApply, FeatureEdit, SteeringSpec, VectorEdit

MAX_SHOWN = 80
# In the schema so that it can be refused by name; the value that asks for nothing is accepted.
NOT_BUILT: dict[str, object] = {
    "presets": [],
    "readout": None,
    "positions": None,
    "window": None,
    "skip_special_tokens": False,
}


def parse_spec(value: object, root: str = "steering") -> SteeringSpec:
    """Validate the steering object of a request, given as JSON text or as a decoded object.

    root: what precedes every path in an error, the field that carried the object.
    Raises SteeringError.
    """
    if isinstance(value, str):
        value = _decode(value, root)
    if not isinstance(value, dict):
        raise SteeringError(f"{root} must be an object, got {_shown(value)}", root)
    try:
        spec = SteeringSpec.model_validate(value)
    except ValidationError as invalid:
        _raise_first(invalid.errors(include_url=False), root)
    except RecursionError:
        raise SteeringError(f"{root} is nested too deeply", root) from None
    _refuse_not_built(spec, root)
    for i, feature in enumerate(spec.features):
        _check_feature(feature, f"{root}.features[{i}]")
    for i, vector in enumerate(spec.vectors):
        _check_vector(vector, f"{root}.vectors[{i}]")
    return spec


def _decode(text: str, root: str) -> object:
    def refuse(constant: str) -> NoReturn:
        raise SteeringError(f"{root} holds {constant}, which is not JSON", root)

    def refuse_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
        decoded = dict(pairs)
        if len(decoded) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise SteeringError(f"{root} has the key {_shown(repeated)} twice in one object", root)
        return decoded

    try:
        return cast(object, json.loads(text, parse_constant=refuse, object_pairs_hook=refuse_repeats))
    except SteeringError:
        raise
    except RecursionError:
        raise SteeringError(f"{root} is nested too deeply", root) from None
    except ValueError as error:
        raise SteeringError(f"{root} must be a JSON object: {error}", root) from None


def _shown(value: object) -> str:
    if isinstance(value, str):
        return repr(value) if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]!r}... ({len(value)} characters)"
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _path(location: tuple[int | str, ...], root: str) -> str:
    return root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)


def _raise_first(errors: list[ErrorDetails], root: str) -> NoReturn:
    # An unknown key explains the missing one that it was meant to be, so it is the better first error.
    error = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    location = error["loc"]
    path = _path(location, root)
    if error["type"] == "extra_forbidden":
        allowed = sorted(_model_at(location[:-1]).model_fields.keys() - NOT_BUILT.keys() - {"name"})
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SteeringError(f"{path} is not a known key; {hint}Allowed: {', '.join(allowed)}", path)
    if error["type"] == "missing":
        raise SteeringError(f"{path} is required", path)
    raise SteeringError(f"{path}: {error['msg']}; got {_shown(error['input'])}", path)


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The schema of the object at `location`."""
    from steer_server.spec.schema import Apply, Condition, FeatureOf, InlineTensor

    names = [part for part in location if isinstance(part, str)]
    if not names:
        return SteeringSpec
    nested: dict[tuple[str, ...], type[BaseModel]] = {
        ("features",): FeatureEdit,
        ("vectors",): VectorEdit,
        ("apply",): Apply,
        ("when",): Condition,
        ("when", "feature"): FeatureOf,
        ("features", "apply"): EntryApply,
        ("vectors", "apply"): EntryApply,
        ("vectors", "data"): InlineTensor,
    }
    return nested[tuple(names)]


def _refuse_not_built(spec: SteeringSpec, root: str) -> None:
    def refuse(entry: BaseModel, path: str) -> None:
        for name, nothing in NOT_BUILT.items():
            value = getattr(entry, name, None)
            if value is not None and value != nothing:
                raise SteeringError(f"{path}.{name} is not supported by this version", f"{path}.{name}")

    refuse(spec, root)
    refuse(spec.apply, f"{root}.apply")
    for kind in ("features", "vectors"):
        for i, entry in enumerate(getattr(spec, kind)):
            if entry.apply is not None:
                refuse(entry.apply, f"{root}.{kind}[{i}].apply")
    for i, feature in enumerate(spec.features):
        if feature.unit != "raw":
            path = f"{root}.features[{i}].unit"
            raise SteeringError(f"{path} {feature.unit!r} is not supported by this version; supported: raw", path)
    for i, vector in enumerate(spec.vectors):
        if vector.name is not None:
            path = f"{root}.vectors[{i}].name"
            raise SteeringError(f"{path}: named vectors are not supported by this version; give `data`", path)


def _check_feature(feature: FeatureEdit, path: str) -> None:
    if feature.op == "ablate":
        if feature.value is not None:
            raise SteeringError(f"{path}.value does not go with op 'ablate'; got {feature.value}", f"{path}.value")
    elif feature.value is None:
        raise SteeringError(f"{path}.value is required with op {feature.op!r}", f"{path}.value")


def _check_vector(vector: VectorEdit, path: str) -> None:
    if vector.data is None:
        raise SteeringError(f"{path}.data is required", f"{path}.data")
    if len(set(vector.layers)) < len(vector.layers):
        raise SteeringError(f"{path}.layers names a layer twice; got {sorted(vector.layers)[:16]}", f"{path}.layers")
    allowed = {"add": {"strength"}, "project_out": set(), "scale_along": {"strength"}, "cap": {"min", "max"}}[vector.op]
    for name in ("strength", "min", "max"):
        value = getattr(vector, name)
        if value is not None and name not in allowed:
            raise SteeringError(f"{path}.{name} does not go with op {vector.op!r}; got {value}", f"{path}.{name}")
    if vector.op == "scale_along" and vector.strength is None:
        raise SteeringError(f"{path}.strength is required with op 'scale_along'", f"{path}.strength")
    if vector.op == "cap":
        if vector.min is None and vector.max is None:
            raise SteeringError(f"{path}.min or {path}.max is required with op 'cap'", f"{path}.min")
        if vector.min is not None and vector.max is not None and vector.min > vector.max:
            raise SteeringError(f"{path}.min {vector.min} is larger than max {vector.max}", f"{path}.min")
