"""The public request: schema, parsing and errors. Imports no torch."""

from steer_server.spec.errors import SteeringError
from steer_server.spec.parse import parse_spec
from steer_server.spec.schema import (
    CONDITION_OPS,
    FEATURE_OPS,
    SCOPES,
    UNITS,
    VECTOR_OPS,
    Apply,
    Condition,
    ConditionOp,
    FeatureEdit,
    FeatureOf,
    FeatureOp,
    InlineTensor,
    Phase,
    SteeringSpec,
    VectorEdit,
    VectorOp,
)

__all__ = [
    "CONDITION_OPS",
    "FEATURE_OPS",
    "SCOPES",
    "UNITS",
    "VECTOR_OPS",
    "Apply",
    "Condition",
    "ConditionOp",
    "FeatureEdit",
    "FeatureOf",
    "FeatureOp",
    "InlineTensor",
    "Phase",
    "SteeringError",
    "SteeringSpec",
    "VectorEdit",
    "VectorOp",
    "parse_spec",
]
