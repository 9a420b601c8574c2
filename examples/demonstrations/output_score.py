"""Rank features by their output score: what clamping one does to the next token, not what activates it.

A feature is set to the middle of its suggested range on the prompt "From my experience,"; the score is the largest
probability that one of the ten tokens its decoder row raises then has, weighted by that token's rank,
(1 - rank / vocabulary). After Arad, Mueller and Belinkov, "SAEs Are Good for Steering - If You Select the Right
Features" (2025), whose score multiplies the same two factors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import typer
from distributions import dense, engine
from rich.progress import track
from vllm import SamplingParams

from sae_models.features import FILE_NAME, FeatureStore, suggested_strength
from steer_server.catalog import find_sae
from steer_server.embedded_model import embedded_model

PROMPT = "From my experience,"
BATCH = 16


def main(sae: str, out: Path = Path("output_scores.json"), labelled: bool = True, limit: int = 10_000) -> None:
    """Score the features of SAE, a shipped one by name: those whose label was read, or all with --no-labelled."""
    loaded = find_sae(sae)
    store = FeatureStore(loaded.folder / FILE_NAME, loaded.sha256)
    features = [f for f in store if f.density and (f.label_source == "read" or not labelled)][:limit]
    llm = engine(str(embedded_model()))
    tokenizer = llm.get_tokenizer()
    vocabulary = {tokenizer.decode([i]): i for i in range(len(tokenizer))}
    prompt = tokenizer(PROMPT)["input_ids"]
    scores = []
    for start in track(range(0, len(features), BATCH), "scoring"):
        part = features[start : start + BATCH]
        params = []
        for feature in part:
            strength = suggested_strength(feature, store.evidence)
            value = (strength.low + strength.high) / 2
            steering = {"features": [{"sae": sae, "index": feature.index, "op": "set", "value": value}]}
            params.append(
                SamplingParams(
                    temperature=0,
                    max_tokens=1,
                    logprobs=-1,
                    flat_logprobs=True,
                    detokenize=False,
                    extra_args={"steering": steering},
                )
            )
        outputs = llm.generate([{"prompt_token_ids": prompt}] * len(part), params, use_tqdm=False)
        for feature, output in zip(part, outputs, strict=True):
            logprobs = dense(output.outputs[0].logprobs, 1)[0]
            ranks = np.empty(len(logprobs), dtype=np.int64)
            ranks[np.argsort(-logprobs)] = np.arange(len(logprobs))
            ids = [vocabulary[t.token] for t in feature.raised if t.token in vocabulary]
            best = max((float(np.exp(logprobs[i]) * (1 - ranks[i] / len(logprobs))) for i in ids), default=0.0)
            scores.append({"index": feature.index, "label": feature.label, "score": best})
    scores.sort(key=lambda row: -row["score"])
    out.write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    for row in scores[:40]:
        typer.echo(f"{row['score']:.3f}  {row['index']:5}  {row['label']}")


if __name__ == "__main__":
    typer.run(main)
