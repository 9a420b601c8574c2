"""`steer-server sae`: what an SAE is, what its features mean, and whether it serves as it should."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar
from urllib.parse import urlencode

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from steer_server.engine.environment import offline_environment

if TYPE_CHECKING:
    from sae_models import SAE
    from sae_models.features import Context, FeatureStore

app = typer.Typer(
    name="sae",
    help="Inspect and convert sparse autoencoders, explain, label and search their features, and measure their "
    "fidelity as served.",
    no_args_is_help=True,
)
console = Console(stderr=True)
NO_SITE = "not possible, the engine has no site there"
T = TypeVar("T")

SaeArgument = Annotated[
    str,
    typer.Argument(
        metavar="SAE",
        help="A shipped SAE by name, or the folder, file or hf://OWNER/REPO/PATH of one, as PATH[?OPTIONS].",
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option("--features", metavar="FILE", help="The SQLite file. Default: features.sqlite beside the weights."),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Its model, a Hugging Face id or a folder. Default: the one that the SAE names."),
]
TextOption = Annotated[
    list[Path],
    typer.Option(
        "--text", metavar="FILE", help="What to read: .jsonl with a `text` in each line, or plain text. Repeatable."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def inspect(sae: SaeArgument, as_json: JsonOption = False) -> None:
    """Print what an SAE is: family, architecture, sizes, where it reads and writes, and the command that serves it."""
    from sae_models.pretrained import pretrained_saes
    from steer_server.sae.describe import describe

    loaded, _ = _find(sae, None)
    facts = describe(loaded, sae, shipped=sae in {shipped.name for shipped in pretrained_saes()})
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    out = Console(highlight=False, markup=False, soft_wrap=True)
    out.print(facts["name"], style="bold")
    for title, text in _facts(facts):
        out.print(f"{title + ':':<14} {text}")


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="IN", help="The folder, file or hf://OWNER/REPO/PATH of an SAE, as PATH[?OPTIONS]."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make, in SAELens' format.")],
    hook: Annotated[
        str | None, typer.Option(help="Where it reads, such as blocks.19.hook_resid_post; several with commas.")
    ] = None,
    hook_out: Annotated[str | None, typer.Option(help="Where a transcoder writes.")] = None,
    norm: Annotated[float | None, typer.Option(help="Mean L2 norm of the activations it was trained on.")] = None,
    norm_out: Annotated[float | None, typer.Option(help="The same of what a transcoder writes.")] = None,
    k: Annotated[int | None, typer.Option(help="Active features per token, of a TopK SAE.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Of every feature, where it was never calibrated.")] = None,
    model: Annotated[str | None, typer.Option(help="The model that it was trained on.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights that are written: float32, bfloat16 or float16.")] = (
        "float32"
    ),
) -> None:
    """Write an SAE of any family as SAELens safetensors: pickles (.pt, .pth, .bin) above all, which no server opens.

    A process of its own reads IN, tensors only, and runs nothing that is in it. OUT appears whole or not at all.
    """
    from sae_models import SAEFormatError
    from sae_models.options import split_location
    from steer_server.catalog import CatalogError, resolve_location
    from steer_server.sae.convert import DTYPES, ConvertError
    from steer_server.sae.convert import convert as convert_checkpoint
    from steer_server.sae.describe import serve_command

    given = {
        "hook": hook, "hook_out": hook_out, "norm": norm, "norm_out": norm_out, "k": k, "threshold": threshold,
        "model": model,
    }  # fmt: skip
    flags = {name: value for name, value in given.items() if value is not None}
    if dtype not in DTYPES:
        _fail(f"--dtype {dtype} is not supported; supported: {', '.join(DTYPES)}")
    try:
        location = f"{source}{'&' if '?' in source else '?'}{urlencode(flags)}" if flags else source
        path, options = split_location(resolve_location(location, pickles=True))
        with Progress(console=console, transient=True) as bars:
            task = bars.add_task("writing features", total=None)
            converted = convert_checkpoint(
                Path(path),
                out,
                options,
                dtype,
                lambda done, of: bars.update(task, completed=done, total=of),
            )
    except (CatalogError, SAEFormatError, ConvertError) as error:
        _fail(str(error))
    loaded = converted.sae
    text = Console(highlight=False, markup=False, soft_wrap=True)
    text.print(
        f"{converted.family} {loaded.architecture}, {loaded.d_sae:,} features of width {loaded.d_in:,} at "
        f"{', '.join(map(str, loaded.hook_points))}, written to {out} as {dtype}"
    )
    text.print(f"look at it:  steer-server sae inspect {shlex.quote(str(out))}")
    command = serve_command(loaded, str(out))
    text.print(f"serve it:    {command or NO_SITE}")


@app.command()
def explain(
    sae: SaeArgument,
    text: TextOption,
    model: ModelOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read at most.")] = 400_000,
    contexts: Annotated[int, typer.Option(min=1, max=100, help="Contexts to keep of each feature.")] = 10,
    spans: Annotated[int, typer.Option(min=0, help="For how many of them to look for the shortest span.")] = 2,
    source: Annotated[
        list[str] | None, typer.Option(help="What the text is and its licence; kept in the file. Repeatable.")
    ] = None,
    features: StoreOption = None,
) -> None:
    """Compute the evidence for every feature: contexts, tokens, frequency. Writes features.sqlite beside the weights.

    Labels in an earlier file of the same SAE stay.
    """
    from sae_models.features import FeatureStore, FeatureStoreError, Label, create_store, relabelled
    from steer_server.sae.explain import ExplainError
    from steer_server.sae.explain import explain as collect
    from steer_server.sae.texts import TextError, read_texts

    loaded, path = _find(sae, features)
    labels: list[Label] = []
    with contextlib.suppress(FeatureStoreError):
        earlier = FeatureStore(path, loaded.sha256)
        labels = [Label(f.index, f.label, f.label_source) for f in earlier if f.label_source != "automatic"]
    try:
        texts = read_texts(text)
        with Progress(console=console, transient=False) as bars:
            tasks: dict[str, TaskID] = {}

            def advance(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            evidence, found = collect(
                loaded,
                _model(loaded, model),
                texts,
                source or [path.name for path in text],
                tokens=tokens,
                contexts=contexts,
                spans=spans,
                progress=advance,
            )
            _sound(lambda: create_store(path, evidence, relabelled(found, labels)))
    except (TextError, ExplainError) as error:
        _fail(str(error))
    console.print(
        f"{evidence.tokens:,} tokens read; evidence of {loaded.d_sae:,} features, {len(labels)} labels kept: {path}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("eval")
def evaluate(
    sae: SaeArgument,
    text: TextOption,
    model: ModelOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run at most, six times each.")] = 20_000,
    context_length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence, at most.")] = 256,
    eager: Annotated[bool, typer.Option("--eager", help="Serve without torch.compile, which starts sooner.")] = False,
    histogram: Annotated[Path, typer.Option(metavar="PNG", help="Where to draw the densities of the features.")] = Path(
        "feature-density.png"
    ),
    as_json: JsonOption = False,
) -> None:
    """Measure the SAE's fidelity as served, beside Hugging Face in fp32: the two must agree.

    Explained variance, CE-loss and KL scores, L0, and which features are active on each token. Exit status 1 where
    served and reference differ by more than their bounds.
    """
    loaded, _ = _find(sae, None)
    folder = _model(loaded, model)
    os.environ.update(offline_environment(embedded=folder != model))
    from steer_server.sae.evaluate import evaluate as measure
    from steer_server.sae.fidelity import EvalError
    from steer_server.sae.fidelity_plot import save_density_histogram
    from steer_server.sae.texts import TextError, read_texts

    try:
        report = measure(loaded, folder, read_texts(text), tokens=tokens, context_length=context_length, eager=eager)
    except (TextError, EvalError) as error:
        _fail(str(error))
    save_density_histogram(report, histogram)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1))
    else:
        Console().print(report.as_table())
    for message in report.disagreements:
        console.print(f"served and reference disagree: {message}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"feature densities drawn in {histogram}", highlight=False)
    if not report.agrees:
        raise typer.Exit(1)


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
            Text(row["label"]),
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
    return loaded, features or loaded.folder / FILE_NAME


def _model(sae: SAE, given: str | None) -> str:
    """The model to run: the one given, or the SAE's own, which for the embedded model is its folder."""
    from steer_server import embedded_model

    if given is not None:
        return given
    if sae.model_name is None:
        _fail(f"{sae.name} does not name its model; give it with --model")
    if sae.model_name.rpartition("/")[2].lower() != embedded_model.NAME.lower():
        return sae.model_name
    try:
        return str(embedded_model.embedded_model())
    except embedded_model.EmbeddedModelError as error:
        _fail(str(error))


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


def _facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of `inspect`."""

    def places(found: list[dict[str, Any]]) -> str:
        return ", ".join(p["hook_point"] + ("" if p["armable"] else " (the engine has no site there)") for p in found)

    def spread(values: dict[str, Any]) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())

    transcodes = facts["reads"] != facts["writes"]
    return [
        ("family", f"{facts['family']} ({facts['version']})"),
        ("architecture", facts["architecture"] + (f", k {facts['k']}" if facts["k"] else "")),
        ("features", f"{facts['d_sae']:,}"),
        ("width", f"{facts['d_in']:,}" + (f" in, {facts['d_out']:,} out" if transcodes else "")),
        ("reads", places(facts["reads"])),
        *([("writes", places(facts["writes"]))] if transcodes else []),
        ("token norm", facts["token_norm"]),
        ("model", facts["model"] or "unknown"),
        ("skips", f"{facts['skip_first']} tokens at the start of a sequence"),
        ("decoder norms", spread(facts["decoder_norms"])),
        ("thresholds", spread(facts["thresholds"]) if facts["thresholds"] else "none"),
        ("dtype", facts["dtype"]),
        *(("file", f"{file['path']} ({file['bytes']:,} bytes)") for file in facts["files"]),
        ("sha256", facts["sha256"]),
        ("serve it", facts["serve"] or NO_SITE),
    ]


def _shown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _range(suggested: dict[str, float] | None) -> str:
    return "unknown" if suggested is None else f"{suggested['low']:g} to {suggested['high']:g}"


def _marked(context: Context) -> str:
    """The context on one line, its peak in guillemets."""
    pieces = [*context.tokens[: context.peak], "«", context.tokens[context.peak], "»"]
    return "".join([*pieces, *context.tokens[context.peak + 1 :]]).replace("\n", " ")
