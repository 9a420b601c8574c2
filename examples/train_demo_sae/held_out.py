"""Write the documents that the harvest did not reach, chats and prose apart, to evaluate on."""

import json
import random
from pathlib import Path

import typer
from activations import chunks
from transformers import AutoTokenizer


def main(model: str, corpus: list[Path], state: Path = Path("activations/state.json"), out: Path = Path()) -> None:
    """From the CORPUS files in the order that the harvest had them, with its state.json; writes held_out_*.jsonl."""
    taken = json.loads(state.read_text())["chunks"]
    documents = [json.loads(line) for path in corpus for line in path.read_text().splitlines()]
    # The harvest shuffled the texts alone in the same way: the order is the same, and sources are known here.
    random.Random(0).shuffle(documents)
    tokenizer = AutoTokenizer.from_pretrained(model)
    seen = 0
    kept: dict[str, list[str]] = {"chat": [], "prose": []}
    for document in documents:
        if seen >= taken:
            kept["chat" if document["source"] == "chat" else "prose"].append(document["text"])
        seen += len(chunks([document["text"]], tokenizer))
    for kind, texts in kept.items():
        (out / f"held_out_{kind}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        typer.echo(f"{len(texts):,} documents of {kind}")


if __name__ == "__main__":
    typer.run(main)
