"""Harvest residual-stream activations of the model on the corpus, several layers in one pass.

Writes one raw float16 array of [tokens, d_model] per layer, documents of all sources and chats shuffled together.
Interrupted runs continue where they stopped.
"""

import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT = 256
BATCH = 8
# The first token of a sequence is an attention sink whose norm is far from all others; the SAE leaves it out and its
# card says so (`skip_first`).
SKIP_FIRST = 1


def chunks(texts: list[str], tokenizer: object, per_document: int = 2) -> list[list[int]]:
    """Token ids of at most CONTEXT each, at most `per_document` of every text."""
    ids = []
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += [tokens[i : i + CONTEXT] for i in range(0, len(tokens), CONTEXT)][:per_document]
    return [chunk for chunk in ids if len(chunk) >= 32]


def main(
    model: str,
    corpus: list[Path],
    out: Path = Path("activations"),
    layers: str = "15",
    limit: int = 2_500_000,
    seed: int = 0,
) -> None:
    """Run MODEL (a folder in Hugging Face format) over the CORPUS files, up to LIMIT tokens."""
    wanted = [int(layer) for layer in layers.split(",")]
    texts = [json.loads(line)["text"] for path in corpus for line in path.read_text().splitlines()]
    random.Random(seed).shuffle(texts)
    tokenizer = AutoTokenizer.from_pretrained(model)
    todo = chunks(texts, tokenizer)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model
    network.layers = network.layers[: max(wanted) + 1]
    seen: dict[int, torch.Tensor] = {}

    def remember(layer: int, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        seen[layer] = output[0] if isinstance(output, tuple) else output

    for layer in wanted:
        network.layers[layer].register_forward_hook(partial(remember, layer))

    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"chunks": 0, "tokens": 0}
    width = network.config.hidden_size
    sinks = {}
    for layer in wanted:
        sinks[layer] = (out / f"layer{layer}.f16").open("ab")
        # What was written after the last recorded state is written again.
        sinks[layer].truncate(state["tokens"] * width * 2)

    progress_bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
    with progress_bar as progress, torch.inference_mode():
        task = progress.add_task("tokens", total=limit, completed=state["tokens"])
        while state["chunks"] < len(todo) and state["tokens"] < limit:
            batch = todo[state["chunks"] : state["chunks"] + BATCH]
            length = max(map(len, batch))
            ids = torch.zeros(len(batch), length, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, chunk in enumerate(batch):
                ids[row, : len(chunk)] = torch.tensor(chunk)
                mask[row, : len(chunk)] = 1
            network(input_ids=ids, attention_mask=mask, use_cache=False)
            kept = mask.bool()
            kept[:, :SKIP_FIRST] = False
            for layer in wanted:
                sinks[layer].write(seen[layer][kept].to(torch.float16).numpy().tobytes())
                sinks[layer].flush()
            state["chunks"] += len(batch)
            state["tokens"] += int(kept.sum())
            state_file.write_text(json.dumps(state))
            progress.update(task, completed=state["tokens"])
    for layer in wanted:
        data = np.memmap(out / f"layer{layer}.f16", dtype=np.float16, mode="r").reshape(-1, width)
        norms = np.linalg.norm(data[:: max(1, len(data) // 10_000)].astype(np.float32), axis=1)
        mean, high = norms.mean(), np.quantile(norms, 0.99)
        typer.echo(f"layer {layer}: {len(data):,} tokens, residual norm mean {mean:.1f}, 99 % {high:.1f}")


if __name__ == "__main__":
    typer.run(main)
