"""`GET /v1/steering/features`: what the features of the served SAEs mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from sae_models import SAE
from sae_models.features import FILE_NAME, Evidence, Feature, FeatureStore, FeatureStoreError, summary
from steer_server.api.errors import error_response
from steer_server.spec import SteeringError

router = APIRouter(tags=["steering"])

MAX_LIMIT = 100
MAX_QUERY = 500


def open_stores(saes: Mapping[str, SAE]) -> dict[str, FeatureStore]:
    """The evidence that lies beside each SAE's weights, by the SAE's name. Raises FeatureStoreError."""
    paths: dict[str, Path] = {name: sae.folder / FILE_NAME for name, sae in saes.items()}
    return {name: FeatureStore(path, saes[name].sha256) for name, path in paths.items() if path.is_file()}


@router.get("/features")
def search_features(
    request: Request,
    q: Annotated[str, Query(max_length=MAX_QUERY)],
    sae: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 10,
) -> Any:
    """Features whose label or evidence holds words of Q, best first (BM25); of SAE, or of all that are served."""
    try:
        stores = request.app.state.steering_features if sae is None else {sae: _store(request, sae)}
        found = [(hit.score, name, hit.feature) for name in stores for hit in stores[name].search(q, limit)]
    except (SteeringError, FeatureStoreError) as error:
        return _refused(error)
    found.sort(key=lambda hit: (-hit[0], hit[1], hit[2].index))
    data = [
        _described(name, feature, stores[name].evidence) | {"score": round(score, 3)}
        for score, name, feature in found[:limit]
    ]
    return {"object": "list", "data": data}


@router.get("/features/{sae:path}/{index}")
def get_feature(request: Request, sae: str, index: int) -> Any:
    """One feature with all its evidence."""
    try:
        store = _store(request, sae)
        feature = store.get(index)
    except KeyError:
        message = f"index {index} is outside SAE {sae!r}, which has features 0 to {store.evidence.d_sae - 1}"
        return _refused(SteeringError(message, "index", status=404))
    except (SteeringError, FeatureStoreError) as error:
        return _refused(error)
    detail = asdict(feature)
    return _described(sae, feature, store.evidence) | {
        name: detail[name] for name in ("quantiles", "raised", "lowered", "informative", "contexts")
    }


def _described(sae: str, feature: Feature, evidence: Evidence) -> dict[str, Any]:
    return {"object": "steering.feature", "sae": sae} | summary(feature, evidence)


def _store(request: Request, sae: str) -> FeatureStore:
    stores: dict[str, FeatureStore] = request.app.state.steering_features
    if sae in stores:
        return stores[sae]
    known = [described["name"] for described in request.app.state.steering["saes"]]
    if sae in known:
        message = f"no evidence was computed for SAE {sae!r}; `steer-server sae explain` does that"
    else:
        message = f"no SAE {sae!r} is served; served: {', '.join(known) or 'none'}"
    raise SteeringError(message, "sae", status=404)


def _refused(error: SteeringError | FeatureStoreError) -> JSONResponse:
    if isinstance(error, FeatureStoreError):
        # The file was sound when the server started.
        error = SteeringError(f"the evidence cannot be read any more: {error}", "sae", status=503)
    return error_response(error)
