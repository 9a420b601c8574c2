"""Which model it is, from its files."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

WHOLE = 16 << 20
PIECE = 1 << 20


def model_facts(model: str) -> dict[str, Any]:
    """The model's name and a fingerprint of its folder; of a Hugging Face id that is no folder, the name alone.

    Files up to 16 MiB are read whole; of larger ones the size, the first and the last MiB: reading all weights again
    would take as long as loading them.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    digest = sha256()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE:
                digest.update(file.read())
            else:
                digest.update(file.read(PIECE))
                file.seek(size - PIECE)
                digest.update(file.read(PIECE))
    return {"name": folder.name, "files": f"sha256:{digest.hexdigest()}"}
