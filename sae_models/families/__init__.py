"""One module for each published format of checkpoints.

Each has NAME, VERSIONS and LAYOUT for people, ARCHITECTURES, `detect(checkpoint)`, which looks at names and
configurations only, and `load(checkpoint)`, which raises SAEFormatError where the files do not hold together.
"""

from __future__ import annotations

from types import ModuleType

from sae_models.families import (
    circuit_tracer,
    clt,
    deepseek_r1,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    mistral_sae,
    openai_gpt2,
    qwen_scope,
    saelens,
    sparsify,
    temporal,
)

FAMILIES: tuple[ModuleType, ...] = (
    saelens, temporal, dictionary_learning, sparsify, clt, circuit_tracer, gemma_scope, gemma_scope_2, llama_scope,
    llamascopium, mistral_sae, qwen_scope, goodfire, deepseek_r1, openai_gpt2,
)  # fmt: skip
"""In the order in which they are tried: the first that recognises a checkpoint reads it."""
