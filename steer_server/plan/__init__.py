"""From a spec and a catalog to an immutable plan: edit rows per site, fingerprint, cache keys."""

from steer_server.plan.cache_keys import BlockKeys
from steer_server.plan.limits import Limits
from steer_server.plan.plan import (
    UNBOUNDED,
    Condition,
    DecoderRow,
    Edit,
    EncoderRow,
    InlineRow,
    Plan,
    Response,
    RowRef,
    Target,
    decode_plan,
    encode_plan,
)
from steer_server.plan.receipt import (
    CLOSED,
    OPEN,
    AppliedEntry,
    GateRecord,
    Receipt,
    TokenCounts,
    TokenSpans,
    applied_tokens,
)
from steer_server.plan.resolve import Entry, Resolved, resolve

__all__ = [
    "CLOSED",
    "OPEN",
    "UNBOUNDED",
    "AppliedEntry",
    "BlockKeys",
    "Condition",
    "DecoderRow",
    "Edit",
    "EncoderRow",
    "Entry",
    "GateRecord",
    "InlineRow",
    "Limits",
    "Plan",
    "Receipt",
    "Resolved",
    "Response",
    "RowRef",
    "Target",
    "TokenCounts",
    "TokenSpans",
    "applied_tokens",
    "decode_plan",
    "encode_plan",
    "resolve",
]
