"""Select the part of the corpus whose text may be shipped: evidence quotes it.

Training on a text copies nothing of it into the weights' licence; quoting it in a file does. So copyleft sources and
collected quotations are left out here.
"""

import json
import random
from pathlib import Path

import typer

SHIPPABLE = {
    "bible-kjv-text": "King James Bible (public domain)",
    "dict-jargon": "The Jargon File (public domain)",
    "python3.11-doc": "Python documentation (PSF-2.0)",
    "wordnet-base": "WordNet glosses (WordNet 3.0 licence)",
    "chat": "chats of SmolLM2-135M-Instruct itself",
}


def main(corpus: list[Path], out: Path = Path("evidence.jsonl"), seed: int = 0) -> None:
    """Write the shippable documents of the CORPUS files to OUT, and print their sources."""
    rows = [json.loads(line) for path in corpus for line in path.read_text().splitlines()]
    kept = [row for row in rows if row["source"] in SHIPPABLE]
    random.Random(seed).shuffle(kept)
    out.write_text("".join(json.dumps(row) + "\n" for row in kept))
    typer.echo(f"{len(kept):,} of {len(rows):,} documents written to {out}")
    for source in sorted({row["source"] for row in kept}):
        typer.echo(f'--source "{SHIPPABLE[source]}"')


if __name__ == "__main__":
    typer.run(main)
