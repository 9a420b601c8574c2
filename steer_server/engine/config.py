"""What the operator configured, from the options given to the server to what each process of the engine needs.

It travels in vLLM's `additional_config["steering"]`: as options (all optional) when a user writes it, resolved once the
model is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sae_models import HookPoint
from sae_models.pretrained import pretrained_for
from steer_server.catalog import open_catalog, resolve_location
from steer_server.plan import Limits

DEFAULT_MAX_EDITS = 32
ROWS_PER_EDIT = 2
"""A feature edit reads along an encoder row and writes along a decoder row; a vector's edit needs one."""

OP_VERSION = 1
"""Part of the compiled graph's cache key: raise it when the op's schema or the place of its calls changes."""


class ConfigError(ValueError):
    """Steering options that this model or this engine cannot have."""


class SteeringOptions(BaseModel):
    """`--additional-config '{"steering": {...}}'`, which `steer-server serve` writes from its flags."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    layers: list[int] | None = Field(None, description="Decoder layers to arm, from 0. Default: all.")
    saes: dict[str, str] = Field({}, description="Where an SAE is, by the name that requests use: PATH[?OPTIONS].")
    pretrained: bool = Field(True, description="Load the shipped SAEs that were trained on this model.")
    rows: int | None = Field(None, ge=1, description="Capacity of the row bank. Default: enough for every batch.")
    max_edits: int | None = Field(None, ge=1, le=1 << 20, description="Edit rows that one request may use.")


@dataclass(frozen=True)
class ModelFacts:
    """What the configuration of an engine says about the model that it will load."""

    name: str
    d_model: int
    n_layers: int
    max_num_seqs: int
    max_num_batched_tokens: int
    frontends: int
    """API server processes, each of which admits requests on its own."""
    stages: int = 1
    """Of the pipeline."""


@dataclass(frozen=True)
class SteeringConfig:
    """Resolved: the same in every process of the engine.

    layers: decoder layers whose outputs are armed. sites: the armed hook points, in TransformerLens' spelling: those
    outputs and what else the SAEs need. A site's number is its place here.
    saes: (name, local path with its options). rows: capacity of the row bank. budget: rows that one front end may have
    admitted at a time; None where the bank holds every batch that vLLM can schedule, so nothing needs counting.
    max_num_seqs, max_num_batched_tokens: vLLM's, what one forward has at most. stages: of its pipeline.
    """

    layers: tuple[int, ...]
    sites: tuple[str, ...]
    saes: tuple[tuple[str, str], ...]
    d_model: int
    n_layers: int
    rows: int
    budget: int | None
    max_edits: int
    max_num_seqs: int
    max_num_batched_tokens: int
    stages: int = 1

    @property
    def limits(self) -> Limits:
        # What was found at one stage would have to reach those behind, and the scheduler, which hears the last only.
        return Limits(max_edits=self.max_edits, conditions=self.stages == 1)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, for `additional_config`."""
        lists = {"layers": list(self.layers), "sites": list(self.sites), "saes": [list(sae) for sae in self.saes]}
        return {"resolved": asdict(self) | lists}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SteeringConfig:
        resolved = dict(data["resolved"])
        resolved["layers"] = tuple(resolved["layers"])
        resolved["sites"] = tuple(resolved["sites"])
        resolved["saes"] = tuple((name, path) for name, path in resolved["saes"])
        return SteeringConfig(**resolved)

    def graph_factors(self) -> dict[str, Any]:
        """The part that changes the compiled graph; the rest must not cost a recompilation."""
        return {"steering": {"op": OP_VERSION, "sites": list(self.sites)}}


def parse_options(value: object) -> SteeringOptions:
    """Options as a user wrote them. Raises ConfigError naming the option."""
    try:
        return SteeringOptions.model_validate(value)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        path = ".".join(["steering", *(str(part) for part in error["loc"])])
        allowed = ", ".join(SteeringOptions.model_fields)
        raise ConfigError(f"{path}: {error['msg']}, got {error['input']!r}. Options: {allowed}") from None


def resolve_config(options: SteeringOptions, model: ModelFacts) -> SteeringConfig:
    """Defaults filled in and everything checked against the model. Raises ConfigError, and CatalogError for SAEs."""
    layers = tuple(range(model.n_layers)) if options.layers is None else tuple(sorted(set(options.layers)))
    if not layers or layers[0] < 0 or layers[-1] >= model.n_layers:
        raise ConfigError(f"steering layers {list(layers)}: {model.name} has decoder layers 0 to {model.n_layers - 1}")
    max_edits = options.max_edits if options.max_edits is not None else max(DEFAULT_MAX_EDITS, len(layers))
    full = model.max_num_seqs * max_edits * ROWS_PER_EDIT
    rows = full if options.rows is None else min(options.rows, full)
    budget = None if rows == full else rows // model.frontends
    if budget is not None and budget < max_edits * ROWS_PER_EDIT:
        needed = max_edits * ROWS_PER_EDIT * model.frontends
        raise ConfigError(
            f"steering rows {rows}: one request may need {max_edits * ROWS_PER_EDIT} (max_edits {max_edits} x "
            f"{ROWS_PER_EDIT}) in each of {model.frontends} API server(s); give at least {needed}"
        )
    saes = {name: resolve_location(location) for name, location in options.saes.items()}
    if options.pretrained:
        for sae in pretrained_for(model.name):
            if sae.d_in == model.d_model and all(point.layer in layers for point in sae.hook_points):
                saes.setdefault(sae.name, str(sae.folder))
    points = {HookPoint(layer) for layer in layers}
    for sae in open_catalog(saes.items(), model.d_model, layers).saes.values():
        points.update(sae.hook_points, sae.hook_points_out)
    return SteeringConfig(
        layers=layers,
        sites=tuple(str(point) for point in sorted(points)),
        saes=tuple(saes.items()),
        d_model=model.d_model,
        n_layers=model.n_layers,
        rows=rows,
        budget=budget,
        max_edits=max_edits,
        max_num_seqs=model.max_num_seqs,
        max_num_batched_tokens=model.max_num_batched_tokens,
        stages=model.stages,
    )
