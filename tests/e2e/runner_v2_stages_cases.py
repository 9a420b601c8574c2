"""Pipeline stages on the V2 model runner. `test_runner_v2.py` runs this."""

import pytest

from tests.e2e import engines
from tests.e2e.random_cases import LAYERS, compare_all, prompt, start
from tests.e2e.test_parallel import find_site, lose_site, two_workers

__all__ = ["two_workers"]


def test_pipeline_parallel(random_model, random_saes, random_oracle, random_specs, two_workers):
    names = ("every layer", "generation", "kind/layer_norm", "kind/transcoder")
    specs = {name: random_specs[name] for name in names}
    llm = start(random_model, random_saes, pipeline_parallel_size=2)
    try:
        config = llm.llm_engine.vllm_config
        assert config.use_v2_model_runner
        assert config.scheduler_config.async_scheduling
        first, last = ([check["site"] for check in checks] for checks in llm.collective_rpc("steering_self_test"))
        assert {site.split(".")[1] for site in first} == {"0", "1"}
        assert {site.split(".")[1] for site in last} == {"2", "3"}
        compare_all(llm, random_oracle, specs)
        spec = specs["every layer"]
        for layer in (0, LAYERS - 1):
            site = f"blocks.{layer}.hook_resid_post"
            llm.collective_rpc(lose_site, args=(site,))
            with pytest.raises(Exception, match=f"steering was not applied at {site}; the answer is withheld"):
                engines.generate(llm, [prompt(2)], [engines.params(spec, max_tokens=8, detokenize=False)])
            llm.collective_rpc(find_site, args=(site,))
        compare_all(llm, random_oracle, {"every layer": spec})
    finally:
        engines.stop(llm)
