"""One module for each architecture's maths.

Each has `activations`, the published definition on q = z @ W_enc, and `canonical`, the same in the one form that the
engine runs. What is special about transcoders is on the side of the decoder.
"""

from __future__ import annotations

from types import ModuleType

from sae_models.architectures import (
    abstopk,
    batchtopk,
    clt_own_layer,
    gated,
    groupmax,
    hierarchical_topk,
    jumprelu,
    matryoshka,
    prolu,
    relu,
    skip_transcoder,
    switch,
    topk,
    transcoder,
)
from sae_models.architectures.variants import SAME_AT_INFERENCE

__all__ = ["ENCODERS", "REFUSED", "SAME_AT_INFERENCE", "TRANSCODERS"]

ENCODERS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        relu, gated, jumprelu, prolu, topk, abstopk, batchtopk, matryoshka, groupmax, hierarchical_topk, switch,
    )
}  # fmt: skip

TRANSCODERS: dict[str, ModuleType] = {module.NAME: module for module in (transcoder, skip_transcoder, clt_own_layer)}

REFUSED: dict[str, str] = {
    "temporal": "its features depend on earlier tokens through an attention of its own, which an edit row cannot hold",
    "matching_pursuit": "its features are found one after the other, each on what the last ones left over",
    "crosscoder": "its features are read from several layers or models at once, before any of them may be written",
}
"""Architectures that are recognised and not loaded, and why."""
