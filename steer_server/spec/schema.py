"""The `steering` object of a request.

Parts that this version does not carry out are in the schema so that they are refused by name, see `parse.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

FeatureOp = Literal["set", "add", "min", "max", "scale", "ablate"]
VectorOp = Literal["add", "project_out", "scale_along", "cap"]
Phase = Literal["prompt", "generation", "all"]
ConditionOp = Literal[">", ">=", "<", "<="]
Scope = Literal["token"]
Unit = Literal["raw", "max_act", "std", "resid_norm", "neuronpedia"]

FEATURE_OPS: tuple[str, ...] = get_args(FeatureOp)
VECTOR_OPS: tuple[str, ...] = get_args(VectorOp)
CONDITION_OPS: tuple[str, ...] = get_args(ConditionOp)
SCOPES: tuple[str, ...] = get_args(Scope)
UNITS: tuple[str, ...] = ("raw",)
"""Units that this version converts."""

MAX_VALUE = 1e6
"""Largest magnitude of a number in a spec. Squares of it, as norms take them, stay finite in float32."""

MAX_ENTRIES = 1024
"""Longest list in a spec. A server's own limit on edit rows is far below; this one bounds the cost of parsing."""

Finite = Annotated[float, Field(ge=-MAX_VALUE, le=MAX_VALUE, allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class EntryApply(_Strict):
    """Where one entry acts; fields left out come from the spec's own `apply`."""

    phase: Phase = "all"
    skip_first: Index = 0
    skip_special_tokens: Any = None
    positions: Any = None
    window: Any = None


class Apply(EntryApply):
    """Where every entry acts, unless the entry says otherwise."""

    preserve_norm: bool = False


class FeatureEdit(_Strict):
    """One operation on one SAE feature."""

    sae: Name
    index: Index
    op: FeatureOp
    value: Finite | None = None
    unit: Unit = "raw"
    apply: EntryApply | None = None


class FeatureOf(_Strict):
    """A feature of an SAE."""

    sae: Name
    index: Index


class Condition(_Strict):
    """What must hold of a token for the entries to act on it: its activation of a feature, compared with `value`."""

    feature: FeatureOf
    op: ConditionOp
    value: Finite
    scope: Scope = "token"


class InlineTensor(_Strict):
    """Little-endian values in C order, base64."""

    dtype: Literal["float32", "float16", "bfloat16"]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**31 - 1)]], Field(min_length=1, max_length=2)]
    data: str


class VectorEdit(_Strict):
    """One operation along one direction, at the output of each of `layers`."""

    name: Any = None
    data: InlineTensor | None = None
    layers: Annotated[list[Index], Field(min_length=1, max_length=MAX_ENTRIES)]
    op: VectorOp = "add"
    strength: Finite | None = None
    min: Finite | None = None
    max: Finite | None = None
    apply: EntryApply | None = None


class SteeringSpec(_Strict):
    """What a client asks for."""

    features: Annotated[list[FeatureEdit], Field(max_length=MAX_ENTRIES)] = []
    vectors: Annotated[list[VectorEdit], Field(max_length=MAX_ENTRIES)] = []
    apply: Apply = Apply()
    presets: Any = None
    when: Annotated[list[Condition], Field(max_length=MAX_ENTRIES)] | None = None
    readout: Any = None
