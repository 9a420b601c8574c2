"""One module for each published format of checkpoints.

Each has NAME, VERSIONS and LAYOUT for people, ARCHITECTURES, `detect(checkpoint)`, which looks at names and
configurations only, and `load(checkpoint)`, which raises SAEFormatError where the files do not hold together.
"""

from __future__ import annotations

from types import ModuleType

from sae_models.families import (
    circuit_tracer,
    clt,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    llamascopium,
    mistral_sae,
    saelens,
    sparsify,
    temporal,
)

FAMILIES: tuple[ModuleType, ...] = (
    saelens, temporal, dictionary_learning, sparsify, clt, circuit_tracer, gemma_scope, gemma_scope_2, llama_scope,
    llamascopium, mistral_sae,
)  # fmt: skip
"""In the order in which they are tried: the first that recognises a checkpoint reads it."""
