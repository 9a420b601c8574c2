"""Which layer steers best: difference-of-means directions of ten themes at each layer, before an SAE is trained there.

For every theme, layer and strength (a share of the layer's median residual norm) the server's own engine answers the
prompts with the theme's direction added. Two things are measured: the share of the answer's distinct words that
belong to the theme, less that of the unsteered answer, and how much less fluent it is (mean log-probability under the
unsteered model, less that of the unsteered answer). A layer's score is the mean over themes of the most words among
the strengths that cost less than FLUENCY_LOSS.
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

THEMES = json.loads((Path(__file__).parent / "themes.json").read_text())
PROMPTS = ("Tell me about your weekend.", "Write a short story.", "What should I do today?")
SHARES = (0.2, 0.35, 0.5, 0.7)
FLUENCY_LOSS = 1.5
"""Nats per token."""


def directions(
    model: torch.nn.Module, tokenizer: object, layers: list[int]
) -> tuple[dict[tuple[str, int], np.ndarray], dict[int, float]]:
    """(unit direction by theme and layer, mean residual norm by layer); a theme's mean less that of all the others."""
    means: dict[tuple[str, int], torch.Tensor] = {}
    norms: dict[int, list[float]] = {layer: [] for layer in layers}
    with torch.inference_mode():
        for theme, entry in THEMES.items():
            states = [
                model(**tokenizer(t, return_tensors="pt"), output_hidden_states=True).hidden_states
                for t in entry["texts"]
            ]
            for layer in layers:
                rows = torch.cat([state[layer + 1][0, 1:] for state in states])
                means[theme, layer] = rows.mean(0)
                norms[layer] += rows.norm(dim=1).tolist()
    unit = {}
    for theme, layer in means:
        others = torch.stack([m for (t, at), m in means.items() if at == layer and t != theme]).mean(0)
        direction = (means[theme, layer] - others).numpy()
        unit[theme, layer] = direction / np.linalg.norm(direction)
    return unit, {layer: float(np.median(values)) for layer, values in norms.items()}


@torch.inference_mode()
def mean_logprob(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    logprobs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(answer)[:, None]).mean())


def word_share(text: str, words: list[str]) -> float:
    """Share of the text's distinct words that begin like one of the theme's; loops must not count."""
    spoken = set(text.lower().split())
    return sum(any(w.strip("\"'.,!?*").startswith(word) for word in words) for w in spoken) / max(1, len(spoken))


def main(model: str, out: Path = Path("layers.json"), layers: str = "12,15,18,21", tokens: int = 40) -> None:
    """Compare LAYERS of MODEL (a folder in Hugging Face format)."""
    wanted = [int(layer) for layer in layers.split(",")]
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    unit, norms = directions(network, tokenizer, wanted)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for p in PROMPTS
    ]
    cases = [(theme, layer, share) for theme, layer in unit for share in SHARES]
    llm = LLM(model, dtype="float32", max_model_len=512, enforce_eager=True)

    def steering(theme: str, layer: int, share: float) -> dict:
        data = unit[theme, layer].astype(np.float32)
        tensor = {"dtype": "float32", "shape": list(data.shape), "data": base64.b64encode(data.tobytes()).decode()}
        vector = {"data": tensor, "layers": [layer], "op": "add", "strength": share * norms[layer]}
        return {"vectors": [vector], "apply": {"skip_first": 1}}

    def sampling(extra: dict | None) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra and {"steering": extra}
        )

    plain = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling(None))
    requests = [({"prompt_token_ids": p}, sampling(steering(*case))) for case in cases for p in prompts]
    steered = llm.generate([r[0] for r in requests], [r[1] for r in requests])
    base_fluency = np.mean(
        [mean_logprob(network, p, list(o.outputs[0].token_ids)) for p, o in zip(prompts, plain, strict=True)]
    )
    rows = []
    for i, (theme, layer, share) in enumerate(track(cases, "reading")):
        outputs = steered[i * len(prompts) : (i + 1) * len(prompts)]
        words = THEMES[theme]["words"]
        said = np.mean([word_share(o.outputs[0].text, words) for o in outputs])
        said_plain = np.mean([word_share(o.outputs[0].text, words) for o in plain])
        fluency = np.mean(
            [mean_logprob(network, p, list(o.outputs[0].token_ids)) for p, o in zip(prompts, outputs, strict=True)]
        )
        rows.append({"theme": theme, "layer": layer, "share": share, "words": said - said_plain,
                     "fluency_loss": base_fluency - fluency, "text": outputs[0].outputs[0].text})  # fmt: skip
    scores = {
        layer: float(np.mean([
            max([r["words"] for r in rows
                 if (r["theme"], r["layer"]) == (theme, layer) and r["fluency_loss"] < FLUENCY_LOSS] or [0.0])
            for theme in THEMES
        ]))
        for layer in wanted
    }  # fmt: skip
    out.write_text(json.dumps({"scores": scores, "norms": norms, "cases": rows}, indent=1) + "\n")
    table = Table(
        "layer", "median residual norm", "theme words gained", title="difference of means, best strength each"
    )
    for layer, score in scores.items():
        table.add_row(str(layer), f"{norms[layer]:.1f}", f"{score:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
