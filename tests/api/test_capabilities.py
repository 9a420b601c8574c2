"""What a server says of itself."""

from steer_server.api.capabilities import capabilities
from steer_server.engine.admission import Admission
from steer_server.engine.config import ModelFacts, parse_options, resolve_config


def test_the_self_test_of_all_pipeline_stages():
    config = resolve_config(
        parse_options({"pretrained": False}),
        ModelFacts("m", 8, 4, max_num_seqs=2, max_num_batched_tokens=64, frontends=1),
    )
    stages = [[{"layer": 0, "passed": True}, {"layer": 1, "passed": True}], [{"layer": 2, "passed": True}]]
    described = capabilities("m", Admission(config), stages, ())
    assert described["self_test"] == {"workers": 2, "layers": [0, 1, 2], "passed": True}
    stages[1][0]["passed"] = False
    assert not capabilities("m", Admission(config), stages, ())["self_test"]["passed"]
