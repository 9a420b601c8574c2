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


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle"])
def test_drafts(method, random_model, random_saes, random_oracle, random_specs, tmp_path):
    drafting = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        drafting |= {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
    elif method == "eagle":
        drafting |= {"model": str(random_eagle(tmp_path, random_model))}
    else:
        # Itself, unsteered: right where nothing is steered, wrong more often where something is.
        drafting |= {"model": str(random_model)}
    llm = start(random_model, random_saes, enforce_eager=True, speculative_config=drafting)
    try:
        compare_all(llm, random_oracle, random_specs | {"late": LATE}, tokens=48)
        counted = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
        assert 0 < counted["vllm:spec_decode_num_accepted_tokens"] < counted["vllm:spec_decode_num_draft_tokens"]
    finally:
        engines.stop(llm)
