"""`steer-server sae`: what the features of an SAE mean, and whether it serves as it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sae_models import SAE
    from sae_models.features import Context, FeatureStore

app = typer.Typer(
    name="sae",
    help="Explain, label and search the features of a sparse autoencoder, and measure its fidelity as served.",
    no_args_is_help=True,
)
console = Console(stderr=True)
T = TypeVar("T")

SaeArgument = Annotated[str, typer.Argument(metavar="SAE", help="A shipped SAE by name, or the folder of one.")]
StoreOption = Annotated[
    Path | None,
    typer.Option("--features", metavar="FILE", help="The SQLite file. Default: features.sqlite beside the weights."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def search(
    sae: SaeArgument,
    query: Annotated[str, typer.Argument(help="Words, such as: sadness.")],
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many features to print.")] = 10,
    features: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find features by the words of their labels and evidence."""
    from sae_models.features import summary

    _, store = _open(sae, features)
    hits = _sound(lambda: store.search(query, limit))
    rows = [summary(hit.feature, store.evidence) for hit in hits]
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    if not rows:
        console.print(f"Nothing in {sae} speaks of {query!r}.", highlight=False, markup=False)
        return
    table = Table("feature", "label", "from", "maximum", "density", "set it to")
    for row in rows:
        table.add_row(
            str(row["index"]),
            row["label"],
            row["label_source"],
            _shown(row["max_activation"], ".1f"),
            _shown(row["density"], ".3%"),
            _range(row["suggested"]),
        )
    Console().print(table)


@app.command()
def show(
    sae: SaeArgument,
    index: Annotated[int, typer.Argument(min=0, help="The feature.")],
    features: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print all evidence of one feature."""
    from sae_models.features import summary

    loaded, store = _open(sae, features)
    try:
        feature = _sound(lambda: store.get(index))
    except KeyError:
        _fail(f"there is nothing about feature {index}; {loaded.name} has features 0 to {loaded.d_sae - 1}")
    row = summary(feature, store.evidence)
    if as_json:
        typer.echo(json.dumps(asdict(feature) | row, indent=1, ensure_ascii=False))
        return
    out = Console(highlight=False, markup=False, soft_wrap=True)
    out.print(f"{loaded.name}/{index}  {feature.label}", style="bold")
    out.print(
        f"label: {feature.label_source}; active on {_shown(feature.density, '.3%')} of tokens; "
        f"maximum {_shown(feature.max_activation, '.1f')}; set it to {_range(row['suggested'])}"
    )
    for title, scores in (
        ("raises", feature.raised),
        ("lowers", feature.lowered),
        ("active at, in bits", feature.informative),
    ):
        out.print(f"{title}: " + ", ".join(f"{s.token.strip() or repr(s.token)} {s.score:.2g}" for s in scores))
    for context in feature.contexts:
        out.print(f"{context.activations[context.peak]:8.1f}  {_marked(context)}")


@app.command()
def label(
    sae: SaeArgument,
    labels: Annotated[
        Path, typer.Argument(help='JSON lines such as {"index": 740, "label": "scripture"}, written by a reader.')
    ],
    features: StoreOption = None,
) -> None:
    """Put labels that someone wrote into the SAE's feature file."""
    from sae_models.features import LabelError, read_labels

    loaded, store = _open(sae, features)
    try:
        wanted = read_labels(labels, loaded.d_sae)
    except LabelError as error:
        _fail(str(error))
    changed = _sound(lambda: store.relabel(wanted))
    console.print(f"{changed} of {len(wanted)} labels were new in {store.path}", highlight=False, soft_wrap=True)


@app.command("import-neuronpedia")
def import_neuronpedia(
    sae: SaeArgument,
    files: Annotated[
        list[Path], typer.Argument(help="Exports: explanations/batch-N.jsonl.gz and features/batch-N.jsonl.gz.")
    ],
    features: StoreOption = None,
) -> None:
    """Import explanations and feature rows of Neuronpedia's exports.

    Where the SAE has a feature file, its features get the labels, except those whose label was read off the evidence
    here. Otherwise a new file is made of what the exports say.
    """
    from sae_models.features import Evidence, FeatureStore, Label, LabelError, create_store, read_neuronpedia

    loaded, path = _find(sae, features)
    try:
        imported = read_neuronpedia(files, loaded.d_sae)
    except LabelError as error:
        _fail(str(error))
    labels = [Label(f.index, f.label, f.label_source) for f in imported.values() if f.label]
    if path.is_file():
        store = _sound(lambda: FeatureStore(path, loaded.sha256))
        changed = _sound(lambda: store.relabel(labels))
    else:
        evidence = Evidence(
            sae_name=loaded.name,
            sae_sha256=loaded.sha256,
            model_name=loaded.model_name or "",
            layer=loaded.hook_point.layer,
            d_sae=loaded.d_sae,
            tokens=0,
            mean_residual_norm=0.0,
            sources=("Neuronpedia",),
        )
        _sound(lambda: create_store(path, evidence, (imported[index] for index in sorted(imported))))
        changed = len(labels)
    console.print(f"{changed} of {len(labels)} labels were new in {path}", highlight=False, soft_wrap=True)


def _find(sae: str, features: Path | None) -> tuple[SAE, Path]:
    from sae_models.features import FILE_NAME
    from steer_server.catalog import CatalogError, find_sae

    try:
        loaded = find_sae(sae)
    except CatalogError as error:
        _fail(str(error))
    return loaded, features or loaded.weights.parent / FILE_NAME


def _open(sae: str, features: Path | None) -> tuple[SAE, FeatureStore]:
    from sae_models.features import FeatureStore

    loaded, path = _find(sae, features)
    if not path.is_file():
        _fail(f"{loaded.name} has no evidence yet ({path} is missing); make it with: steer-server sae explain {sae}")
    return loaded, _sound(lambda: FeatureStore(path, loaded.sha256))


def _sound(work: Callable[[], T]) -> T:
    """What `work` returns; a feature file that it cannot read or write ends the command with a message."""
    from sae_models.features import FeatureStoreError

    try:
        return work()
    except FeatureStoreError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    console.print(f"error: {message}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1)


def _shown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _range(suggested: dict[str, float] | None) -> str:
    return "unknown" if suggested is None else f"{suggested['low']:g} to {suggested['high']:g}"


def _marked(context: Context) -> str:
    """The context on one line, its peak in guillemets."""
    pieces = [*context.tokens[: context.peak], "«", context.tokens[context.peak], "»"]
    return "".join([*pieces, *context.tokens[context.peak + 1 :]]).replace("\n", " ")
