"""`GET /v1/steering/capabilities`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, get_args

from sae_models import SAE
from steer_server import __version__
from steer_server.engine.admission import Admission
from steer_server.spec import CONDITION_OPS, FEATURE_OPS, SCOPES, UNITS, VECTOR_OPS, InlineTensor, Phase
from steer_server.spec.parse import NOT_BUILT
from steer_server.spec.schema import MAX_ENTRIES, MAX_VALUE


def capabilities(
    model: str, admission: Admission, checks: list[list[dict[str, Any]]], searchable: Collection[str]
) -> dict[str, Any]:
    """model: the name it is served by. checks: the start-up self-test of each worker. searchable: the SAEs whose
    features can be searched."""
    config = admission.config
    return {
        "object": "steering.capabilities",
        "version": __version__,
        "model": model,
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "layers": list(config.layers),
        "hook_points": list(config.sites),
        "saes": [_described(name, sae, name in searchable) for name, sae in admission.catalog.saes.items()],
        "features": {"ops": list(FEATURE_OPS), "units": list(UNITS)},
        "vectors": {
            "ops": list(VECTOR_OPS),
            "dtypes": list(get_args(InlineTensor.model_fields["dtype"].annotation)),
        },
        "apply": {"phases": list(get_args(Phase)), "options": ["phase", "skip_first", "preserve_norm"]},
        "when": {"ops": list(CONDITION_OPS), "scopes": list(SCOPES)} if config.limits.conditions else None,
        "not_supported": [*NOT_BUILT, "vectors.name"],
        "limits": {
            "max_edits": config.max_edits,
            "max_entries": MAX_ENTRIES,
            "max_value": MAX_VALUE,
            "max_inline_bytes": config.limits.max_inline_bytes,
            "rows": config.rows,
        },
        "self_test": {
            "workers": len(checks),
            "layers": sorted({check["layer"] for worker in checks for check in worker}),
            "passed": all(check["passed"] for worker in checks for check in worker),
        },
    }


def _described(name: str, sae: SAE, searchable: bool) -> dict[str, Any]:
    return {
        "name": name,
        "architecture": sae.architecture,
        "d_sae": sae.d_sae,
        "k": None if sae.selection is None else sae.selection.k,
        "layer": sae.hook_point.layer,
        "hook_point": str(sae.hook_point),
        "hook_points": [str(point) for point in sae.hook_points],
        "hook_points_out": [str(point) for point in sae.hook_points_out],
        "token_norm": sae.token_norm,
        "skip_first": sae.skip_first,
        "sha256": sae.sha256,
        "searchable": searchable,
    }
