"""One module for each published format of checkpoints.

Each has NAME, VERSIONS and LAYOUT for people, ARCHITECTURES, `detect(checkpoint)`, which looks at names and
configurations only, and `load(checkpoint)`, which raises SAEFormatError where the files do not hold together.
"""

from __future__ import annotations

from types import ModuleType

from sae_models.families import deepseek_r1, goodfire, openai_gpt2, qwen_scope, saelens, temporal

FAMILIES: tuple[ModuleType, ...] = (saelens, temporal, qwen_scope, goodfire, deepseek_r1, openai_gpt2)
"""In the order in which they are tried: the first that recognises a checkpoint reads it."""
