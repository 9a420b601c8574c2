"""Speculative decoding: whoever drafts, the steered model decides, and only what stays is counted."""

import pytest
from vllm.v1.metrics.reader import Counter

from tests.e2e import engines
from tests.e2e.random_cases import compare_all, start, vector
from tests.e2e.tiny_models import random_eagle

pytestmark = pytest.mark.engine


LATE = {
    "vectors": [
        {"data": vector(6, 6.0), "layers": [0]},
        {"data": vector(7, 8.0), "layers": [1], "apply": {"skip_first": 45}},
    ]
}
"""For prompts of 24 tokens. The first makes drafts wrong. The second begins among them: to take a drafted token for one
at another position gives another answer."""


def drafting(method, model, folder):
    """vLLM's speculative_config."""
    config = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        return config | {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
    # Itself, unsteered: right where nothing is steered, wrong more often where something is.
    return config | {"model": str(random_eagle(folder, model) if method == "eagle" else model)}


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle"])
def test_drafts(method, random_model, random_saes, random_oracle, random_specs, tmp_path):
    config = drafting(method, random_model, tmp_path)
    llm = start(random_model, random_saes, enforce_eager=True, speculative_config=config)
    try:
        compare_all(llm, random_oracle, random_specs | {"late": LATE}, tokens=48)
        counted = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
        assert 0 < counted["vllm:spec_decode_num_accepted_tokens"] < counted["vllm:spec_decode_num_draft_tokens"]
    finally:
        engines.stop(llm)
