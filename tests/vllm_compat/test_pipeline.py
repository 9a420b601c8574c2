"""What pipeline stages tell each other, and which sites are whose."""

import pytest
import torch
from torch import nn

from steer_server.engine.vllm_compat.pipeline import decode_missing, encode_missing, sites_elsewhere


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("sites", [[], ["blocks.3.hook_resid_post"], [f"blocks.{i}.hook_mlp_out" for i in range(80)]])
def test_missing_sites_arrive_and_are_not_split(sites, ranks):
    encoded = encode_missing(sites, ranks)
    assert decode_missing(encoded) == sites
    assert encoded.dtype == torch.uint8
    assert ranks == 1 or encoded.numel() % ranks != 0


def test_sites_of_layers_that_other_stages_hold():
    from vllm.model_executor.models.utils import PPMissingLayer

    layers = nn.ModuleList([PPMissingLayer(), nn.Linear(2, 2), PPMissingLayer()])
    sites = ["blocks.0.hook_resid_pre", "blocks.1.mlp.hook_in", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    assert sites_elsewhere(sites, layers) == {sites[0], sites[3]}
