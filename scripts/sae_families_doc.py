"""Write docs/sae-families.md: what the families' modules say of themselves, and what their fixtures prove.

Each checkpoint in tests/sae_models/fixtures is opened, and what wrote it stands in its `expected*.safetensors`.
Run it after a family or a fixture was added: python -m scripts.sae_families_doc
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import get_args

import torch
from safetensors import safe_open

from sae_models import SAE, HookPoint, LoadOptions, SAEFormatError, load
from sae_models.architectures import ENCODERS, REFUSED, SAME_AT_INFERENCE, TRANSCODERS
from sae_models.checkpoint import PICKLES, Checkpoint
from sae_models.families import FAMILIES
from sae_models.hook_points import Kind
from sae_models.tensor_source import LoadedTensors

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "sae_models" / "fixtures"
PAGE = ROOT / "docs" / "sae-families.md"
_PLACEHOLDERS = LoadOptions(
    hook="blocks.0.hook_resid_post", hook_out="blocks.0.hook_mlp_out", norm=1.0, norm_out=1.0, k=1, threshold=1.0
)


@dataclass
class Proof:
    """What a family's fixtures show. wrote: checkpoints by what wrote them. refused: those that must not load.

    hook_points: where they read, and write if that is elsewhere. options: those that a checkpoint could not do without.
    """

    wrote: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    hook_points: set[str] = field(default_factory=set)
    options: set[str] = field(default_factory=set)


def fixtures() -> Iterator[tuple[Path, dict[str, str]]]:
    """(checkpoint, what its `expected*.safetensors` says about it)."""
    for expected in sorted(FIXTURES.glob("*/*/expected*.safetensors")):
        with safe_open(expected, framework="pt") as file:
            metadata = file.metadata()
        path = expected.parent / metadata["checkpoint"]
        if "layer" in metadata and path.is_dir():
            # A set of transcoders in one folder: each layer is a file.
            names = (f"layer_{metadata['layer']}.safetensors", f"W_enc_{metadata['layer']}.safetensors")
            path = next(path / name for name in names if (path / name).is_file())
        yield path, metadata


def proofs() -> dict[str, Proof]:
    """By the family's name."""
    found = {family.NAME: Proof() for family in FAMILIES}
    for path, metadata in fixtures():
        checkpoint = Checkpoint(path, LoadOptions(), _open_pickle)
        proof = found[next(family.NAME for family in FAMILIES if family.detect(checkpoint))]
        sae, options = _load(path)
        proof.options |= options
        if metadata["expects"] == "refuse":
            proof.refused += 1
            continue
        assert sae is not None, path
        proof.wrote[_author(metadata)] += 1
        if "hook" not in options:
            proof.hook_points.add(_places(sae))
    return found


def _load(path: Path) -> tuple[SAE | None, set[str]]:
    """(the SAE, the options that its loader asked for): placeholders take the place of what a user would know.

    None where it is refused for what no option changes.
    """
    options, asked = LoadOptions(), set()
    while True:
        try:
            return load(path, options, _open_pickle), asked
        except SAEFormatError as error:
            wanted = re.search(r"add \?(\w+)=", str(error))
            if wanted is None or wanted[1] in asked:
                return None, asked
            asked.add(wanted[1])
            options = replace(options, **{wanted[1]: getattr(_PLACEHOLDERS, wanted[1])})


def _open_pickle(path: Path) -> LoadedTensors:
    tensors = torch.load(path, weights_only=True, map_location="cpu")
    return LoadedTensors(path, {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)})


def _author(metadata: dict[str, str]) -> str:
    library, version = metadata["library"], metadata["version"]
    if library.startswith("none: "):
        return f"its documentation ({library.removeprefix('none: ')})"
    return library if version == "layout" else f"{library} {version}"


def _place(point: HookPoint) -> str:
    return f"`{re.sub(r'blocks[.][0-9]+', 'blocks.L', str(point))}`"


def _places(sae: SAE) -> str:
    points = list(dict.fromkeys((sae.hook_points[0], sae.hook_points_out[0])))
    mark = "" if all(point.armable for point in points) else " †"
    return " to ".join(_place(point) for point in points) + mark


def _checked(proof: Proof) -> str:
    parts = [f"{author}: {count}" for author, count in sorted(proof.wrote.items())]
    return "<br>".join([*parts, *([f"refused as they must be: {proof.refused}"] if proof.refused else [])])


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _families() -> str:
    shown = proofs()
    rows = []
    for family in FAMILIES:
        proof = shown[family.NAME]
        rows.append(
            (
                family.NAME,
                family.VERSIONS,
                f"`{family.LAYOUT}`",
                _code(family.ARCHITECTURES) or "none",
                "<br>".join(sorted(proof.hook_points)) or ("`?hook=`" if proof.wrote else "none"),
                _code(f"?{option}=" for option in sorted(proof.options)) or "none",
                _checked(proof) or "nothing",
            )
        )
    titles = ("family", "versions", "files", "architectures", "hook points", "options needed", "checked against")
    return _table(titles, rows)


def _summary(module: ModuleType) -> str:
    """The first sentence or paragraph of a module's docstring."""
    return " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())


def _architectures() -> str:
    described = {**ENCODERS, **TRANSCODERS}
    rows = [(f"`{name}`", _summary(module)) for name, module in described.items()]
    rows += [(f"`{name}`", f"As `{base}` at inference.") for name, base in SAME_AT_INFERENCE.items()]
    rows += [(f"`{name}`", f"Refused: {reason}.") for name, reason in REFUSED.items()]
    return _table(("architecture", "what it is"), rows)


def _options() -> str:
    text = inspect.getdoc(LoadOptions) or ""
    found = re.findall(r"^(\w+): (.+?)(?=^\w+: |\Z)", text, flags=re.M | re.S)
    return _table(("option", "means"), ((f"`?{name}=`", " ".join(meaning.split())) for name, meaning in found))


def _hook_points() -> str:
    points = [HookPoint(0, kind) for kind in get_args(Kind)]
    armable = ", ".join(_place(point) for point in points if point.armable)
    refused = ", ".join(_place(point) for point in points if not point.armable)
    return f"""The engine reads and writes at {armable}; `L` is a decoder layer, from 0.
Known, so that they are refused by name: {refused}."""


def page() -> str:
    """The whole page."""
    return f"""# SAE families

Generated by `python -m scripts.sae_families_doc` from the loaders and their fixtures; a test compares it with them.

`steer-server serve MODEL --sae NAME=LOCATION` takes a folder or a file, `hf://OWNER/REPO[/PATH][@REVISION]`, or the
name of a SAELens release, `RELEASE:SAE_ID` (`pip install --no-deps sae-lens` brings their table, which is all that is
read of it). Its files tell the family.

{_families()}

*Hook points* and *options needed* are those of the checked checkpoints: `L` is a layer, and at places marked † an SAE
can be loaded and not served. *Checked against* counts checkpoints by the library, with its version, that wrote them and
computed the activations and reconstructions that ours must equal; where no library writes a family, by the publication
whose equations were followed, independently of the loader.

Pickles ({_code(PICKLES)}) can run code when they are opened. A server refuses them;
`steer-server sae convert IN OUT` makes SAELens files of them once.

## Options

What the files do not say is never guessed. It goes behind the location: `LOCATION?hook=blocks.19.hook_resid_post&k=64`.

{_options()}

## Architectures

{_architectures()}

## Hook points

{_hook_points()}
Names are read in TransformerLens' spelling, in Hugging Face's (`model.layers.L.mlp`) and in those of the families.
"""


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(f"written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
