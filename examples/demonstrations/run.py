"""Reproduce the demonstrations and measure how far steering moved the text.

Everything runs through the server's engine. For each demonstration: the greedy answer without and with steering, and

* lift: by how much the steered model raises the log-probability of the concept's tokens, in nats, mean over the tokens
  and over the steps of the steered answer, against the unsteered model reading the same text;
* perplexity of the steered answer under the unsteered model, and that of the unsteered answer beside it;
* KL(steered || unsteered) per token, over the steered answer.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import typer
from distributions import engine, generate, kl, perplexity, read
from rich.progress import track

from steer_server.embedded_model import embedded_model

HERE = Path(__file__).parent


def concept_ids(tokenizer: object, words: list[str]) -> list[int]:
    """Tokens that are one of the words, with and without a space before it."""
    ids = {tuple(tokenizer(form + word)["input_ids"]) for word in words for form in ("", " ")}
    return sorted(one[0] for one in ids if len(one) == 1)


def difference_of_means(llm: object, tokenizer: object, positive: list[str], negative: list[str], layer: int) -> dict:
    """Inline vector: mean residual stream over `positive` texts less that over `negative`, at `layer`, at unit norm.

    Computed by Hugging Face, as a reader would.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)

    def mean(texts: list[str]) -> torch.Tensor:
        with torch.inference_mode():
            states = [model(**tokenizer(t, return_tensors="pt"), output_hidden_states=True) for t in texts]
        return torch.cat([s.hidden_states[layer + 1][0, 1:] for s in states]).mean(0)

    direction = (mean(positive) - mean(negative)).numpy().astype(np.float32)
    direction /= np.linalg.norm(direction)
    return {"dtype": "float32", "shape": [len(direction)], "data": base64.b64encode(direction.tobytes()).decode()}


def demonstrate(llm: object, tokenizer: object, demo: dict) -> dict:
    prompt = tokenizer.apply_chat_template(demo["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
    steering = json.loads(json.dumps(demo["steering"]))
    for vector in steering.get("vectors", []):
        if "difference_of_means" in vector:
            texts = vector.pop("difference_of_means")
            vector["data"] = difference_of_means(
                llm, tokenizer, texts["positive"], texts["negative"], vector["layers"][0]
            )
    plain, _ = generate(llm, prompt, None, demo["max_tokens"])
    steered, receipt = generate(llm, prompt, steering, demo["max_tokens"])
    base = read(llm, prompt, steered.ids)
    ids = concept_ids(tokenizer, demo["concept"])
    return {
        "name": demo["name"],
        "unsteered": plain.text,
        "steered": steered.text,
        "applied": receipt["applied"],
        "lift": round(float((steered.logprobs[:, ids] - base[:, ids]).mean()), 3),
        "perplexity_unsteered": round(perplexity(plain.logprobs, plain.ids), 2),
        "perplexity_steered": round(perplexity(base, steered.ids), 2),
        "kl": round(kl(steered.logprobs, base), 3),
    }


def as_markdown(demos: list[dict], results: list[dict]) -> str:
    lines = []
    for demo, result in zip(demos, results, strict=True):
        lines += [
            f"## {demo['name']}",
            "",
            demo["why"],
            "",
            f"> {demo['messages'][-1]['content']}",
            "",
            "```json",
            json.dumps(demo["steering"], ensure_ascii=False),
            "```",
            "",
            "| | |",
            "|---|---|",
            f"| unsteered | {quoted(result['unsteered'])} |",
            f"| steered | {quoted(result['steered'])} |",
            f"| concept tokens | {result['lift']:+.2f} nats |",
            f"| perplexity under the unsteered model | {result['perplexity_steered']:.1f} "
            f"(unsteered answer: {result['perplexity_unsteered']:.1f}) |",
            f"| KL to the unsteered model | {result['kl']:.2f} nats a token |",
            "",
        ]
    return "\n".join(lines)


def quoted(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(
    write: bool = typer.Option(False, help="Rewrite outputs.json and OUTPUTS.md."),
) -> None:
    """Run every demonstration of demonstrations.json. Exit status 1 where a text differs from the recorded one."""
    demos = json.loads((HERE / "demonstrations.json").read_text())
    llm = engine(str(embedded_model()))
    tokenizer = llm.get_tokenizer()
    results = [demonstrate(llm, tokenizer, demo) for demo in track(demos, "demonstrations")]
    if write:
        (HERE / "outputs.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        (HERE / "OUTPUTS.md").write_text("# What the demonstrations print\n\n" + as_markdown(demos, results))
    recorded = {row["name"]: row for row in json.loads((HERE / "outputs.json").read_text())}
    for result in results:
        same = result["steered"] == recorded[result["name"]]["steered"]
        verdict = "as recorded" if same else "DIFFERS from outputs.json"
        perplexities = f"{result['perplexity_unsteered']:.1f} -> {result['perplexity_steered']:.1f}"
        typer.echo(
            f"{result['name']}: lift {result['lift']:+.2f}, KL {result['kl']:.2f}, perplexity {perplexities}, {verdict}"
        )
    if any(result["steered"] != recorded[result["name"]]["steered"] for result in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
