"""The public request: schema, parsing and errors. Imports no torch."""

from steer_server.spec.errors import SteeringError
from steer_server.spec.parse import parse_spec
from steer_server.spec.schema import (
    FEATURE_OPS,
    UNITS,
    VECTOR_OPS,
    Apply,
    FeatureEdit,
    FeatureOp,
    InlineTensor,
    Phase,
    SteeringSpec,
    VectorEdit,
    VectorOp,
)

__all__ = [
    "FEATURE_OPS",
    "UNITS",
    "VECTOR_OPS",
    "Apply",
    "FeatureEdit",
    "FeatureOp",
    "InlineTensor",
    "Phase",
    "SteeringError",
    "SteeringSpec",
    "VectorEdit",
    "VectorOp",
    "parse_spec",
]
