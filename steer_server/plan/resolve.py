"""Spec + catalog -> plan."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from sae_models import SAE, HookPoint
from steer_server.catalog import Catalog
from steer_server.plan.inline_tensors import decode_rows
from steer_server.plan.limits import Limits
from steer_server.plan.plan import Condition, DecoderRow, Edit, EncoderRow, InlineRow, Plan, Response, Target
from steer_server.spec import Apply, FeatureEdit, FeatureOf, SteeringError, SteeringSpec, VectorEdit
from steer_server.spec import Condition as ConditionSpec
from steer_server.spec.schema import MAX_VALUE, EntryApply


@dataclass(frozen=True)
class Entry:
    """One entry of a spec, for its line in the receipt."""

    source: str
    op: str
    layers: tuple[int, ...]
    target: Target


@dataclass(frozen=True)
class Resolved:
    plan: Plan
    entries: tuple[Entry, ...]
    warnings: tuple[str, ...]


def resolve(
    spec: SteeringSpec,
    catalog: Catalog,
    d_model: int,
    layers: Collection[int],
    limits: Limits,
    root: str = "steering",
) -> Resolved:
    """Turn names into hashes and entries into edit rows.

    d_model: width of the residual stream. layers: the armed decoder layers. root: what precedes paths in errors.
    Raises SteeringError: 404 for an SAE that the catalog does not have, 400 for everything else.
    """
    edits: list[Edit] = []
    rows: dict[str, bytes] = {}
    entries: list[Entry] = []
    warnings: list[str] = []
    seen: dict[tuple[str, int], list[tuple[Target, str]]] = {}

    for i, feature in enumerate(spec.features):
        path = f"{root}.features[{i}]"
        sae = _known_sae(feature, catalog, path)
        target = _target(feature.apply, spec.apply, sae, warnings, feature.sae)
        for other, other_path in seen.setdefault((sae.sha256, feature.index), []):
            if target.may_meet(other):
                raise SteeringError(
                    f"{path} edits feature {feature.index} of {feature.sae!r} on tokens where {other_path} does",
                    path,
                )
        seen[sae.sha256, feature.index].append((target, path))
        _check_count(len(edits) + len(sae.hook_points), limits, path)
        edits += _feature_edits(feature, sae, target)
        layers_of_sae = tuple(point.layer for point in sae.hook_points_out)
        entries.append(Entry(f"feature {feature.sae}/{feature.index}", feature.op, layers_of_sae, target))

    for i, vector in enumerate(spec.vectors):
        path = f"{root}.vectors[{i}]"
        for j, layer in enumerate(vector.layers):
            if layer not in layers:
                raise SteeringError(
                    f"{path}.layers[{j}]: layer {layer} is not armed; armed layers: {_ranges(layers)}",
                    f"{path}.layers[{j}]",
                )
        # Before decoding: what is refused costs nothing.
        _check_count(len(edits) + len(vector.layers), limits, path)
        target = _target(vector.apply, spec.apply, None, warnings, "")
        digests = _inline_rows(vector, d_model, rows, path)
        edits += [
            _vector_edit(vector, layer, InlineRow(digest), target)
            for layer, digest in zip(vector.layers, digests, strict=True)
        ]
        entries.append(Entry(f"vector {digests[0][:12]}", vector.op, tuple(vector.layers), target))

    when = [_condition(asked, catalog, limits, f"{root}.when[{i}]") for i, asked in enumerate(spec.when or ())]
    for i, condition in enumerate(when):
        path = f"{root}.when[{i}]"
        _check_count(len(edits) + i + 1, limits, path)
        _check_order(condition, edits, path)

    if not entries:
        warnings.append("the spec names no edit, so nothing was steered")
    plan = Plan.build(edits, rows, spec.apply.preserve_norm, when if edits else ())
    return Resolved(plan, tuple(entries), tuple(dict.fromkeys(warnings)))


def _condition(asked: ConditionSpec, catalog: Catalog, limits: Limits, path: str) -> Condition:
    if not limits.conditions:
        raise SteeringError(f"{path}: conditions are not supported on a server with pipeline stages", path)
    sae = _known_sae(asked.feature, catalog, f"{path}.feature")
    if len(sae.hook_points) > 1:
        where = ", ".join(map(str, sae.hook_points))
        raise SteeringError(
            f"{path}.feature.sae {asked.feature.sae!r} stands at {where}; a condition needs an SAE at one place",
            f"{path}.feature.sae",
        )
    # Workers compare with a float32: f >= v where f is above the number before v.
    value = np.float32(asked.value)
    bound = value if asked.op in (">", "<=") else np.nextafter(value, np.float32(-np.inf))
    return Condition(
        site=str(sae.hook_points[0]),
        read=EncoderRow(sae.sha256, asked.feature.index),
        bound=float(bound),
        negated=asked.op in ("<", "<="),
        norm=sae.token_norm,
    )


def _check_order(condition: Condition, edits: list[Edit], path: str) -> None:
    """Refuse what is read behind a place where it should decide."""
    read = HookPoint.parse(condition.site)
    first = min((HookPoint.parse(edit.site) for edit in edits), default=read)
    if first < read:
        raise SteeringError(
            f"{path}.feature is read at {read}, but the request edits {first}, which comes before it; "
            "a condition decides about edits at its own place and behind it",
            f"{path}.feature",
        )


def _ranges(layers: Collection[int]) -> str:
    """Layers as people write them: 0-29, or 3, 7-9."""
    ordered = sorted(layers)
    starts = [layer for layer in ordered if layer - 1 not in layers]
    ends = [layer for layer in ordered if layer + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _check_count(count: int, limits: Limits, path: str) -> None:
    if count > limits.max_edits:
        raise SteeringError(
            f"{path} brings the request to {count} edit rows (one for each layer an entry acts on, one for each "
            "condition); "
            f"this server takes {limits.max_edits}",
            path,
        )


def _known_sae(feature: FeatureEdit | FeatureOf, catalog: Catalog, path: str) -> SAE:
    sae = catalog.saes.get(feature.sae)
    if sae is None:
        known = ", ".join(sorted(catalog.saes)) or "none is loaded"
        raise SteeringError(f"{path}.sae {feature.sae!r} is not known here; known SAEs: {known}", f"{path}.sae", 404)
    if feature.index >= sae.d_sae:
        raise SteeringError(
            f"{path}.index {feature.index} is outside SAE {feature.sae!r}; allowed: 0 to {sae.d_sae - 1}",
            f"{path}.index",
        )
    return sae


def _target(entry: EntryApply | None, spec: Apply, sae: SAE | None, warnings: list[str], sae_name: str) -> Target:
    """The entry's own `apply`, field by field, then the spec's, then the SAE card's."""

    def given(name: str) -> EntryApply | None:
        return next((part for part in (entry, spec) if part is not None and name in part.model_fields_set), None)

    phase = (given("phase") or spec).phase
    source = given("skip_first")
    if source is None and sae is not None and sae.skip_first > 0:
        warnings.append(f"SAE {sae_name!r} skips the first {sae.skip_first} token(s) of a sequence, as its card says")
        return Target(phase, sae.skip_first)
    return Target(phase, (source or spec).skip_first)


def _feature_edits(feature: FeatureEdit, sae: SAE, target: Target) -> list[Edit]:
    """One for each place where the SAE is."""
    encoder, decoder = EncoderRow(sae.sha256, feature.index), DecoderRow(sae.sha256, feature.index)
    value = feature.value if feature.value is not None else 0.0
    response = {
        "set": Response(scale=0.0, shift=value),
        "add": Response(shift=value),
        "min": Response(low=value),
        "max": Response(high=value),
        "scale": Response(scale=value),
        "ablate": Response(scale=0.0),
    }[feature.op]
    # (f + a) - f does not depend on f: no encoder row is needed.
    read = None if feature.op == "add" else encoder
    edits = []
    for point, point_out in zip(sae.hook_points, sae.hook_points_out, strict=True):
        depends_on_stream = read is not None or sae.token_norm != "none"
        read_site = str(point) if depends_on_stream and point != point_out else None
        edits.append(Edit(str(point_out), read, decoder, response, target, read_site, sae.token_norm))
    return edits


def _vector_edit(vector: VectorEdit, layer: int, row: InlineRow, target: Target) -> Edit:
    site = str(HookPoint(layer))
    if vector.op == "add":
        return Edit(site, None, row, Response(shift=1.0 if vector.strength is None else vector.strength), target)
    if vector.op == "project_out":
        return Edit(site, row, row, Response(scale=0.0), target)
    if vector.op == "scale_along":
        assert vector.strength is not None
        return Edit(site, row, row, Response(scale=vector.strength), target)
    low = float("-inf") if vector.min is None else vector.min
    high = float("inf") if vector.max is None else vector.max
    return Edit(site, row, row, Response(low=low, high=high), target)


def _inline_rows(vector: VectorEdit, d_model: int, rows: dict[str, bytes], path: str) -> list[str]:
    """SHA-256 of the row for each of the entry's layers; their bytes go into `rows`.

    `add` writes the vector as it is; the other ops act along its direction, so it is normalised, in float64.
    """
    assert vector.data is not None
    values = decode_rows(vector.data, d_model, len(vector.layers), f"{path}.data")
    strength = 1.0 if vector.strength is None else vector.strength
    largest = float(np.abs(values).max())
    if vector.op == "add":
        if largest > MAX_VALUE or largest * abs(strength) > MAX_VALUE:
            raise SteeringError(
                f"{path}: strength {strength} times the largest component {largest:g} is over {MAX_VALUE:g}", path
            )
    else:
        norms = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
        if (norms == 0).any():
            raise SteeringError(f"{path}.data has a zero row, which has no direction to act along", f"{path}.data")
        values = (values / norms).astype(np.float32)
    digests = []
    for row in values:
        data = row.tobytes()
        digest = hashlib.sha256(data).hexdigest()
        rows[digest] = data
        digests.append(digest)
    return digests * len(vector.layers) if len(digests) == 1 else digests
