"""Drafts on the V2 model runner, under asynchronous scheduling. `test_runner_v2.py` runs this."""

import pytest
from vllm.v1.metrics.reader import Counter

from tests.e2e import engines
from tests.e2e.random_cases import compare_all, start
from tests.e2e.test_speculative import LATE


@pytest.fixture(scope="module")
def few_specs(random_specs):
    """An interpreted kernel takes a thousand times as long as a compiled one."""
    names = ("every layer", "generation", "kind/layer_norm")
    return {name: random_specs[name] for name in names} | {"late": LATE}


def test_where_drafts_lie_is_known_only_to_the_device(random_model, random_saes, random_oracle, few_specs):
    drafting = {"method": "draft_model", "model": str(random_model), "num_speculative_tokens": 3}
    llm = start(random_model, random_saes, enforce_eager=True, speculative_config=drafting)
    try:
        config = llm.llm_engine.vllm_config
        assert config.use_v2_model_runner
        assert config.scheduler_config.async_scheduling
        compare_all(llm, random_oracle, few_specs, tokens=40)
        counted = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
        assert 0 < counted["vllm:spec_decode_num_accepted_tokens"] < counted["vllm:spec_decode_num_draft_tokens"]
    finally:
        engines.stop(llm)
