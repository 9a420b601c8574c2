"""How much of an encoder an eight-bit screen leaves to be read, for encode_topk_screened to be certain.

    python -m benchmarks.kernels.screen

writes benchmarks/results/kernels_screen.json. Counts, not times: they need no GPU.
Two kinds of tokens: the embedded model's on its own SAEs, over this repository's README; and normal numbers on random
encoders, where nothing stands out and the bound is worst beside the pre-activations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sae_models.pretrained import pretrained_saes
from steer_kernels.eight_bit import EIGHT_BIT_DTYPES, eight_bit_reference, quantise
from steer_kernels.pre_activations import pre_activations_reference
from steer_server.embedded_model import embedded_model

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "kernels_screen.json"
RANDOM = [(2304, 16_384, 64), (4096, 32_768, 64), (4096, 131_072, 64)]
TOKENS = 256
RANDOM_TOKENS = 8
ROWS = 4096
"""Rows of the encoder at once."""

Part = tuple[torch.Tensor, torch.Tensor]
"""(encoder, b_enc) of some features."""


def needed(x: torch.Tensor, parts: Iterable[Part], k: int) -> dict[torch.dtype, torch.Tensor]:
    """By dtype of the copy, [tokens]: features whose upper end is not below the k-th p. It takes them all."""
    pre_acts: list[torch.Tensor] = []
    uppers: dict[torch.dtype, list[torch.Tensor]] = {dtype: [] for dtype in EIGHT_BIT_DTYPES}
    for encoder, b_enc in parts:
        pre_acts.append(pre_activations_reference(x, encoder, b_enc))
        for dtype, ends in uppers.items():
            p8, bound = eight_bit_reference(x, quantise(encoder, dtype), b_enc)
            ends.append(p8 + bound)
    kth = torch.cat(pre_acts, dim=1).topk(k).values[:, -1:]
    return {dtype: (torch.cat(ends, dim=1) >= kth).sum(-1) for dtype, ends in uppers.items()}


def random_parts(d_in: int, d_sae: int) -> Iterator[Part]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(0, d_sae, ROWS):
        yield torch.randn(ROWS, d_in, generator=generator).div_(d_in**0.5), torch.zeros(ROWS)


def residuals(layer: int) -> torch.Tensor:
    """[TOKENS, d_model]: what leaves the layer, but for the first token, which SAEs are not trained on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model()
    tokens = AutoTokenizer.from_pretrained(folder)((ROOT / "README.md").read_text(), return_tensors="pt").input_ids
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        states = model(tokens[:, : TOKENS + 1], output_hidden_states=True).hidden_states
    return states[layer + 1][0, 1:]


def described(name: str, x: torch.Tensor, parts: Iterable[Part], d_sae: int, k: int) -> dict[str, Any]:
    record: dict[str, Any] = {"encoder": name, "d_in": x.shape[1], "d_sae": d_sae, "k": k, "tokens": x.shape[0]}
    for dtype, counts in needed(x, parts, k).items():
        record[str(dtype).removeprefix("torch.")] = {"median": int(counts.median()), "most": int(counts.max())}
    return record


def main() -> None:
    console, records = Console(), []
    for sae in pretrained_saes():
        W_enc, b_enc = sae.encoder()
        if sae.selection is None:
            continue
        x = residuals(sae.hook_point.layer)
        records.append(described(sae.name, x, [(W_enc.T.contiguous(), b_enc)], sae.d_sae, sae.selection.k))
        console.print(records[-1])
    for d_in, d_sae, k in RANDOM:
        x = torch.randn(RANDOM_TOKENS, d_in, generator=torch.Generator().manual_seed(1))
        records.append(described("random", x, random_parts(d_in, d_sae), d_sae, k))
        console.print(records[-1])
    RESULT.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
