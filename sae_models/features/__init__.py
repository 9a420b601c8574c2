"""What the features of an SAE mean: evidence, labels, and their search. One SQLite file per SAE."""

from sae_models.features.feature import QUANTILES, Context, Evidence, Feature, LabelSource, TokenScore
from sae_models.features.labels import Label, LabelError, read_labels
from sae_models.features.neuronpedia import read_neuronpedia
from sae_models.features.store import FILE_NAME, FeatureStore, FeatureStoreError, SearchHit, create_store, relabelled
from sae_models.features.strength import StrengthRange, suggested_strength
from sae_models.features.summary import summary

__all__ = [
    "FILE_NAME",
    "QUANTILES",
    "Context",
    "Evidence",
    "Feature",
    "FeatureStore",
    "FeatureStoreError",
    "Label",
    "LabelError",
    "LabelSource",
    "SearchHit",
    "StrengthRange",
    "TokenScore",
    "create_store",
    "read_labels",
    "read_neuronpedia",
    "relabelled",
    "suggested_strength",
    "summary",
]
