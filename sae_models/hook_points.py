"""Named places in a model, read in the spellings of TransformerLens, Hugging Face and the SAE families."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal

Kind = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_post", "mlp_out", "hook_z", "ln2_normalized",
    "embed",
]  # fmt: skip

_FORWARD: tuple[Kind, ...] = (
    "embed", "resid_pre", "hook_z", "attn_out", "resid_mid", "ln2_normalized", "mlp_in", "mlp_post", "mlp_out",
    "resid_post",
)  # fmt: skip
"""In the order in which a forward reaches them."""

ARMABLE: tuple[Kind, ...] = ("resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_out")
"""Kinds of places that a running engine can read and write. The rest is known so that it can be refused by name."""

_TRANSFORMER_LENS: dict[Kind, str] = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_in": "blocks.{}.mlp.hook_in",
    "mlp_post": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "hook_z": "blocks.{}.attn.hook_z",
    "ln2_normalized": "blocks.{}.ln2.hook_normalized",
    "embed": "hook_embed",
}

# TransformerLens' `hook_mlp_in` is the stream before the MLP's norm, not what the MLP reads.
_SPELLINGS: tuple[tuple[str, Kind], ...] = (
    (r"blocks\.(\d+)\.hook_resid_pre", "resid_pre"),
    (r"blocks\.(\d+)\.hook_resid_mid", "resid_mid"),
    (r"blocks\.(\d+)\.hook_mlp_in", "resid_mid"),
    (r"blocks\.(\d+)\.hook_resid_post", "resid_post"),
    (r"blocks\.(\d+)\.hook_attn_out", "attn_out"),
    (r"blocks\.(\d+)\.mlp\.hook_in", "mlp_in"),
    (r"blocks\.(\d+)\.mlp\.hook_post", "mlp_post"),
    (r"blocks\.(\d+)\.(?:hook_mlp_out|mlp\.hook_out)", "mlp_out"),
    (r"blocks\.(\d+)\.attn\.hook_z", "hook_z"),
    (r"blocks\.(\d+)\.ln2\.hook_normalized", "ln2_normalized"),
    (r"()hook_embed|()(?:[a-z_]+\.)*(?:embed_tokens|wte|embed_in)", "embed"),
    (r"resid_post_layer_(\d+)", "resid_post"),
    (r"attention_out_layer_(\d+)|attn_out_layer_(\d+)", "attn_out"),
    (r"mlp_out_layer_(\d+)", "mlp_out"),
)

_LAYER = r"(?:(?:[a-z_]+\.)*(?:layers|h|blocks)\.)(\d+)"
_HUGGING_FACE: tuple[tuple[str, Kind], ...] = (
    (r"\.input", "resid_pre"),
    (r"(?:\.output)?", "resid_post"),
    (r"\.(?:self_attn|attn|attention)(?:\.output)?", "attn_out"),
    (r"\.(?:self_attn|attn|attention)\.(?:o_proj|c_proj|dense)\.input", "hook_z"),
    (r"\.mlp(?:\.output)?|\.post_feedforward_layernorm\.output", "mlp_out"),
    (r"\.mlp\.input|\.pre_feedforward_layernorm\.output", "mlp_in"),
)


@total_ordering
@dataclass(frozen=True)
class HookPoint:
    """A place in decoder layer `layer`, counted from 0. Ordered as a forward reaches them.

    kind: `resid_post`, the residual stream after the layer; `resid_pre`, before it, which is `resid_post` of the layer
    before and therefore only said of layer 0; `resid_mid`, between attention and MLP; `attn_out` and `mlp_out`, what
    attention and MLP add to the stream, after the norm that some architectures put behind them; `mlp_in`, what the
    MLP's own weights read; `mlp_post`, its neurons; `ln2_normalized`, that before the norm's weights; `hook_z`, what
    the attention's output projection reads; `embed`, the token embeddings.
    """

    layer: int
    kind: Kind = "resid_post"

    def __lt__(self, other: HookPoint) -> bool:
        return (self.layer, _FORWARD.index(self.kind)) < (other.layer, _FORWARD.index(other.kind))

    def __str__(self) -> str:
        return _TRANSFORMER_LENS[self.kind].format(self.layer)

    @property
    def armable(self) -> bool:
        """Whether a running engine can have a site here."""
        return self.kind in ARMABLE

    @staticmethod
    def parse(name: str) -> HookPoint:
        """Read a place in any known spelling, such as `blocks.15.hook_resid_post` or `model.layers.15.mlp`.

        Raises ValueError for a name that is none. `post_attention_layernorm` is none: it is the MLP's input in some
        architectures and the attention's output in others.
        """
        spelled = [(pattern, kind) for pattern, kind in _SPELLINGS]
        spelled += [(f"{_LAYER}(?:{ending})", kind) for ending, kind in _HUGGING_FACE]
        for pattern, kind in spelled:
            match = re.fullmatch(pattern, name)
            if match is not None:
                layer = int(next((group for group in match.groups() if group), "0"))
                if kind == "resid_pre" and layer > 0:
                    return HookPoint(layer - 1)
                return HookPoint(layer, kind)
        known = ", ".join(name.format("<layer>") for name in _TRANSFORMER_LENS.values())
        raise ValueError(f"hook point {name!r} is not known; known: {known}, and their Hugging Face names")
