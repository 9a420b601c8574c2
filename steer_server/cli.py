"""`steer-server`: serve, batch, doctor, sae."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from steer_server import __version__
from steer_server.embedded_model import SERVED_NAME, EmbeddedModelError, embedded_model
from steer_server.engine.environment import offline_environment, vllm_environment
from steer_server.sae.commands import app as sae_app

app = typer.Typer(
    name="steer-server",
    help="Steer any vLLM server: sparse autoencoder features and steering vectors, per request, over the OpenAI API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(sae_app)
console = Console(stderr=True)

PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True}

LogFormat = Literal["bar", "json"]

Model = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] [VLLM_FLAGS]",
        help="A Hugging Face id or a folder, any model that vLLM serves; without it the embedded "
        "SmolLM2-135M-Instruct. Every other flag goes to vLLM (see `vllm serve --help=all`).",
    ),
]
Sae = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH",
        help="An SAE to serve, by the name that requests use: a folder or file of any published family, or "
        "hf://OWNER/REPO/PATH; what its files leave out goes behind it as ?OPTIONS (docs/sae-families.md). Repeatable.",
    ),
]
PretrainedSaes = Annotated[
    bool, typer.Option("--pretrained-saes/--no-pretrained-saes", help="Serve the shipped SAEs of this model, if any.")
]
Layers = Annotated[
    str | None,
    typer.Option("--steering-layers", metavar="LIST", help="Decoder layers to arm, such as 0-11,15. Default: all."),
]
Rows = Annotated[
    int | None,
    typer.Option(
        "--steering-rows",
        min=1,
        help="Capacity of the row bank. Default: enough for every batch that vLLM can schedule. "
        "With less, requests that do not fit get a 429.",
    ),
]
MaxEdits = Annotated[
    int | None,
    typer.Option(
        "--steering-max-edits",
        min=1,
        max=1024,
        help="Edit rows that one request may use, counted once for each layer they act on. "
        "Default: 32, or the number of armed layers where that is more.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Steer any vLLM server."""


@app.command(context_settings=PASS_THROUGH)
def serve(
    arguments: Model = None,
    sae: Sae = None,
    pretrained_saes: PretrainedSaes = True,
    steering_layers: Layers = None,
    steering_rows: Rows = None,
    steering_max_edits: MaxEdits = None,
) -> None:
    """Serve MODEL over the OpenAI API, steerable by every request.

    This is `vllm serve` with the plugin named in VLLM_PLUGINS and its options in --additional-config.
    """
    model, flags = _split_model(arguments or [])
    options = steering_options(sae, pretrained_saes, steering_layers, steering_rows, steering_max_edits)
    command = _arguments_or_exit(model, flags, options)
    os.environ.update(vllm_environment(embedded=model is None))
    console.print(f"vllm serve {' '.join(command)}", highlight=False, markup=False, soft_wrap=True)
    os.execv(sys.executable, [sys.executable, "-m", "steer_server.engine.vllm_compat.vllm_cli", "serve", *command])


class WholeFlags(TyperCommand):
    """A command with short options of its own that leaves vLLM's flags of one dash, such as -cc.mode=0, whole."""

    MARK = "--"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        marked = [self.MARK + arg if re.match("-[A-Za-z].", arg) else arg for arg in args]
        return super().parse_args(ctx, marked)

    @classmethod
    def restored(cls, arguments: list[str]) -> list[str]:
        return [arg.removeprefix(cls.MARK) if arg.startswith(f"{cls.MARK}-") else arg for arg in arguments]


@app.command(cls=WholeFlags, context_settings=PASS_THROUGH)
def batch(
    source: Annotated[
        str,
        typer.Option("-i", "--input", metavar="FILE", help="OpenAI batch lines: .jsonl, .jsonl.gz, .parquet, or -."),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="For the results: .jsonl, .jsonl.gz, .parquet, or -.")
    ],
    arguments: Model = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a job that was stopped.")] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Resume, and run the rows that failed again.")
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH=VALUE,...",
            help="Answer each row with every one of these values in its steering, such as strength=0,0.5,1 or "
            "features.0.index=12,77. Repeatable: all combinations.",
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Let a running Steer Server answer instead of an engine here.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run the job on Ray Data; needs the extra `ray` on every machine.")
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="With --ray: of the cluster. Default: $RAY_ADDRESS, or a new one here."),
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="With --ray: engines at a time. Default: 1.")] = None,
    in_flight: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows being answered at a time. Default: twice --max-num-seqs, 64 with --server. Not with --ray.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but why a job stopped.")] = False,
    log_format: Annotated[
        LogFormat, typer.Option(metavar="bar|json", help="What is said: a progress bar and a table, or JSON lines.")
    ] = "bar",
    sae: Sae = None,
    pretrained_saes: PretrainedSaes = True,
    steering_layers: Layers = None,
    steering_rows: Rows = None,
    steering_max_edits: MaxEdits = None,
) -> None:
    """Answer a file of requests, each exactly as the server would, steering and receipts included.

    Exit status: 0 when every row was answered, 2 when some failed, 1 when the job could not run or was stopped.
    """
    from steer_server.batch import commands
    from steer_server.batch.local_job import Settings
    from steer_server.batch.sweep import SweepError, parse_sweep

    try:
        parsed_sweep = parse_sweep(sweep or [])
    except SweepError as error:
        raise typer.BadParameter(str(error), param_hint="--sweep") from None
    if ray and server is not None:
        raise typer.BadParameter("the server brings its own engines", param_hint="--ray")
    if ray and in_flight is not None:
        raise typer.BadParameter("each engine on Ray takes as many rows as it can run", param_hint="--in-flight")
    for given, flag in ((ray_address, "--ray-address"), (concurrency, "--concurrency")):
        if given is not None and not ray:
            raise typer.BadParameter("only with --ray", param_hint=flag)
    model, flags = _split_model(WholeFlags.restored(arguments or []))
    options = steering_options(sae, pretrained_saes, steering_layers, steering_rows, steering_max_edits)
    if server is not None and (model is not None or flags or options):
        given = " ".join(arguments or options)
        raise typer.BadParameter(f"the server has a model and flags of its own; got {given}", param_hint="--server")
    report = commands.report_for(log_format, quiet)
    command: list[str] = []
    if server is None:
        os.environ.update(offline_environment(embedded=model is None))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            command = vllm_arguments(model, flags, options, report.stage)
        except EmbeddedModelError as error:
            report.stopped(str(error))
            raise typer.Exit(1) from None
    # What the catalog resolves them to is compared instead of paths; the size of the row bank changes no answer.
    deciding = {name: value for name, value in options.items() if name not in ("saes", "rows")}
    settings = Settings(
        source=commands.as_path(source),
        output=commands.as_path(output),
        sweep=parsed_sweep,
        resume=resume or retry_errors,
        retry_errors=retry_errors,
        in_flight=in_flight,
        options={"vllm": commands.deciding_flags(flags), "steering": deciding},
        result_stream=commands.protected_stdout(),
    )
    cluster = None
    if ray:
        from steer_server.batch.cluster import Cluster, gpus_per_replica

        cluster = Cluster(ray_address, concurrency or 1, gpus_per_replica(flags) if _has_gpu() else 0)
    raise typer.Exit(commands.run(commands.job_for(settings, command, server, cluster, report), report))


@app.command(context_settings=PASS_THROUGH)
def doctor(
    arguments: Model = None,
    sae: Sae = None,
    pretrained_saes: PretrainedSaes = True,
    steering_layers: Layers = None,
    steering_rows: Rows = None,
    steering_max_edits: MaxEdits = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Start MODEL's engine, prove that each armed layer changes the residual stream as asked, and stop.

    The server runs the same test whenever it starts. Exit status: 0 when every layer passed, 1 otherwise.
    """
    model, flags = _split_model(arguments or [])
    options = steering_options(sae, pretrained_saes, steering_layers, steering_rows, steering_max_edits)
    os.environ.update(offline_environment(embedded=model is None))
    from steer_server.engine.vllm_compat.offline import self_test_checks

    checks = self_test_checks(_arguments_or_exit(model, flags, options))
    if as_json:
        typer.echo(json.dumps(checks))
    else:
        _print_checks(checks)
    if not checks or not all(check["passed"] for check in checks):
        raise typer.Exit(1)


def _print_checks(checks: list[dict[str, Any]]) -> None:
    table = Table("site", "error", "allowed", "compiled model", "verdict", title="steering self-test")
    for check in checks:
        compiled = check["compiled_error"]
        table.add_row(
            check["site"],
            f"{check['error']:.2e}",
            f"{check['allowed']:.2e}",
            "not compiled" if compiled is None else f"off by {compiled:.1e}",
            "pass" if check["passed"] else "FAIL",
        )
    Console().print(table)


def _split_model(arguments: list[str]) -> tuple[str | None, list[str]]:
    """(MODEL or None, vLLM's flags): MODEL comes first, or as vLLM's --model."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    for i, argument in enumerate(arguments):
        if argument == "--model" and i + 1 < len(arguments):
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--model="):
            return argument.removeprefix("--model="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def parse_layers(text: str) -> list[int]:
    """Layers from a list of numbers and ranges, such as 0-11,15. Raises typer.BadParameter."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise typer.BadParameter(
                f"{part!r} is neither a layer nor a range such as 0-11", param_hint="--steering-layers"
            )
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(layers)


def steering_options(
    saes: list[str] | None, pretrained: bool, layers: str | None, rows: int | None, max_edits: int | None
) -> dict[str, Any]:
    """The flags as `additional_config["steering"]`, only what was given."""
    named: dict[str, str] = {}
    for entry in saes or []:
        name, separator, path = entry.partition("=")
        if not separator or not name or not path:
            raise typer.BadParameter(f"{entry!r} is not NAME=PATH", param_hint="--sae")
        if name in named:
            raise typer.BadParameter(f"the name {name!r} is given twice", param_hint="--sae")
        named[name] = path
    options: dict[str, Any] = {"saes": named} if named else {}
    if not pretrained:
        options["pretrained"] = False
    if layers is not None:
        options["layers"] = parse_layers(layers)
    if rows is not None:
        options["rows"] = rows
    if max_edits is not None:
        options["max_edits"] = max_edits
    return options


def _arguments_or_exit(model: str | None, flags: list[str], options: dict[str, Any]) -> list[str]:
    """`vllm_arguments` for a command whose user reads along."""
    try:
        return vllm_arguments(model, flags, options, lambda text: console.print(text, highlight=False))
    except EmbeddedModelError as error:
        console.print(f"error: {error}", highlight=False, markup=False)
        raise typer.Exit(1) from None


def vllm_arguments(
    model: str | None, flags: list[str], options: dict[str, Any], say: Callable[[str], None]
) -> list[str]:
    """Arguments of `vllm serve` for these flags; without a model, those of the embedded one, which `say` is told.

    Raises EmbeddedModelError.
    """
    additional, flags = _take_additional_config(flags)
    if model is None:
        from sae_models.cache import cache_folder

        say(f"Model: embedded SmolLM2-135M-Instruct, converted once into {cache_folder()}")
        folder = embedded_model()
        given = {flag.partition("=")[0] for flag in flags}
        defaults = {"--served-model-name": [SERVED_NAME], "--dtype": ["float32"], "--max-model-len": ["4096"]}
        for flag, value in defaults.items():
            if flag not in given and not (flag == "--dtype" and _has_gpu()):
                flags = [*flags, flag, *value]
        model = str(folder)
    additional["steering"] = {**additional.get("steering", {}), **options}
    return [model, *flags, "--additional-config", json.dumps(additional)]


def _take_additional_config(flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """A user's own --additional-config, out of `flags`, so that ours joins it instead of replacing it."""
    for i, flag in enumerate(flags):
        if flag == "--additional-config" and i + 1 < len(flags):
            return json.loads(flags[i + 1]), flags[:i] + flags[i + 2 :]
        if flag.startswith("--additional-config="):
            return json.loads(flag.partition("=")[2]), flags[:i] + flags[i + 1 :]
    return {}, flags


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    app()
