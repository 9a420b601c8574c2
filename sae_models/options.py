"""What a user adds where a checkpoint's files do not say enough."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from urllib.parse import parse_qsl

from sae_models.errors import SAEFormatError


@dataclass(frozen=True)
class LoadOptions:
    """Options of `load`, on a command line behind the path: `PATH?hook=blocks.19.hook_resid_post&k=64`.

    hook: where the SAE reads (and writes), in any spelling; several, separated by commas, for a Layer Group.
    hook_out: where a transcoder writes.
    norm: mean L2 norm of the activations that the SAE was trained on, which dataset-wise normalisation needs.
    norm_out: the same of the activations that a transcoder writes.
    k: active features per token, of a TopK SAE; for a Hierarchical TopK SAE any number up to its own.
    threshold: of every feature of a BatchTopK SAE whose own was never calibrated.
    model: the model that the SAE was trained on.
    """

    hook: str | None = None
    hook_out: str | None = None
    norm: float | None = None
    norm_out: float | None = None
    k: int | None = None
    threshold: float | None = None
    model: str | None = None

    def given(self) -> dict[str, str | float | int]:
        """The options that have a value."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def parse(query: str) -> LoadOptions:
        """Read `hook=...&k=...`. Raises SAEFormatError naming the option, its value and what is allowed."""
        known = {field.name: str(field.type) for field in fields(LoadOptions)}
        options: dict[str, str | float | int] = {}
        for name, text in parse_qsl(query, keep_blank_values=True):
            if name not in known:
                raise SAEFormatError(f"SAE option {name!r} is not known; options: {', '.join(known)}")
            if name in options:
                raise SAEFormatError(f"SAE option {name!r} is given twice")
            options[name] = _value(name, known[name], text)
        return LoadOptions(**options)  # type: ignore[arg-type]


def _value(name: str, kind: str, text: str) -> str | float | int:
    if kind.startswith("str"):
        if not text:
            raise SAEFormatError(f"SAE option {name} is empty")
        return text
    try:
        value = int(text) if kind.startswith("int") else float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        wanted = "a whole number of at least 1" if kind.startswith("int") else "a number over 0"
        raise SAEFormatError(f"SAE option {name}={text!r} must be {wanted}")
    return value


def split_location(location: str) -> tuple[str, LoadOptions]:
    """(path, options) of `PATH[?OPTIONS]`."""
    path, _, query = location.partition("?")
    return path, LoadOptions.parse(query)
