"""Fidelity of a trained SAE on text that its training never saw, chats and prose apart, through Hugging Face in fp32.

Explained variance is 1 - E|x - xhat|^2 / (E|x|^2 - |E x|^2), in float64. The CE-loss score is
(CE_zero - CE_sae) / (CE_zero - CE_clean): next-token loss with the layer's stream replaced by zeros, by the SAE's
reconstruction, and as it is. The first token of a sequence is left as it is, as in training.
"""

import json
import random
from functools import partial
from pathlib import Path

import torch
import typer
from activations import SKIP_FIRST, chunks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def reconstruct(w: dict[str, torch.Tensor], k: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(xhat, f) of a TopK SAE with b_dec subtracted from its input."""
    top = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).topk(k, dim=-1)
    f = torch.zeros(len(x), w["W_enc"].shape[1], dtype=x.dtype).scatter(1, top.indices, top.values.relu())
    return f @ w["W_dec"] + w["b_dec"], f


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module, layer: int, w: dict[str, torch.Tensor], k: int, sequences: list[list[int]]
) -> dict:
    double = {name: tensor.double() for name, tensor in w.items()}
    state = {"mode": "clean"}
    sums = {"error": 0.0, "squares": 0.0, "active": 0.0, "n": 0}
    total = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    fired = torch.zeros(w["W_enc"].shape[1], dtype=torch.int64)

    def splice(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        if state["mode"] == "clean":
            return None
        edited = output.clone()
        x = output[0, SKIP_FIRST:].double()
        if state["mode"] == "zero":
            edited[0, SKIP_FIRST:] = 0
            return edited
        xhat, f = reconstruct(double, k, x)
        edited[0, SKIP_FIRST:] = xhat.float()
        sums["error"] += float((x - xhat).square().sum())
        sums["squares"] += float(x.square().sum())
        sums["active"] += float((f > 0).sum())
        sums["n"] += len(x)
        total.add_(x.sum(0))
        fired.add_((f > 0).sum(0))
        return edited

    handle = model.model.layers[layer].register_forward_hook(splice)
    losses = {}
    for mode in ("clean", "sae", "zero"):
        state["mode"] = mode
        loss = tokens = 0.0
        for sequence in sequences:
            ids = torch.tensor([sequence])
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            loss -= float(logprobs.gather(1, ids[0, 1:, None]).sum())
            tokens += len(sequence) - 1
        losses[mode] = loss / tokens
    handle.remove()
    n = sums["n"]
    variance = sums["squares"] / n - float((total / n).square().sum())
    return {
        "tokens": n,
        "explained_variance": 1 - sums["error"] / n / variance,
        "l0": sums["active"] / n,
        "ce_clean": losses["clean"],
        "ce_sae": losses["sae"],
        "ce_zero": losses["zero"],
        "ce_score": (losses["zero"] - losses["sae"]) / (losses["zero"] - losses["clean"]),
        "features_that_fired": int((fired > 0).sum()),
    }


def main(model: str, sae: Path, corpus: list[Path], skip: int = 0, sequences: int = 100, seed: int = 0) -> None:
    """Evaluate SAE on the sequences of CORPUS after the first SKIP, which the harvest took (`chunks` in state.json)."""
    documents = [json.loads(line) for path in corpus for line in path.read_text().splitlines()]
    random.Random(seed).shuffle(documents)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # The harvest shuffled texts alone in the same way: the order is the same, and sources are known here.
    by_kind: dict[str, list[list[int]]] = {"chat": [], "prose": []}
    taken = 0
    for document in documents:
        parts = chunks([document["text"]], tokenizer)
        taken += len(parts)
        if taken > skip:
            by_kind["chat" if document["source"] == "chat" else "prose"] += parts
    config = json.loads((sae / "cfg.json").read_text())
    layer = int(config["metadata"]["hook_name"].split(".")[1])
    weights = {name: tensor.float() for name, tensor in load_file(sae / "sae_weights.safetensors").items()}
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    run = partial(evaluate, network, layer, weights, config["k"])
    report = {kind: run(parts[:sequences]) for kind, parts in by_kind.items()}
    (sae / "fidelity.json").write_text(json.dumps(report, indent=1) + "\n")
    typer.echo(json.dumps(report, indent=1))


if __name__ == "__main__":
    typer.run(main)
