"""Drafts on the V2 model runner, verified in (emulated) CUDA graphs. `test_runner_v2.py` runs this."""

import pytest
from vllm.v1.metrics.reader import Counter

from tests.e2e import engines
from tests.e2e.random_cases import compare_all, start
from tests.e2e.test_speculative import LATE, drafting


@pytest.fixture(scope="module")
def few_specs(random_specs):
    """An interpreted kernel takes a thousand times as long as a compiled one."""
    names = ("every layer", "generation", "kind/layer_norm", "where a feature is on")
    return {name: random_specs[name] for name in names} | {"late": LATE}


@pytest.mark.parametrize(("method", "asynchronous"), [("draft_model", True), ("eagle", True), ("ngram", False)])
def test_drafts(method, asynchronous, random_model, random_saes, random_oracle, few_specs, tmp_path):
    """Asynchronously scheduled, where drafts lie is known only to the device."""
    config = drafting(method, random_model, tmp_path)
    llm = start(random_model, random_saes, enforce_eager=True, speculative_config=config)
    try:
        chosen = llm.llm_engine.vllm_config
        assert chosen.use_v2_model_runner
        assert chosen.scheduler_config.async_scheduling == asynchronous
        compare_all(llm, random_oracle, few_specs, tokens=32)
        counted = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
        assert engines.replays(llm)[1] > 10
        assert 0 < counted["vllm:spec_decode_num_accepted_tokens"] < counted["vllm:spec_decode_num_draft_tokens"]
    finally:
        engines.stop(llm)
