"""Architectures that cannot be armed are refused by name, before anything is served."""

import pytest
import torch
from torch import nn

from steer_server.engine.vllm_compat.decoder_layers import ArmError, arm, find_decoder_layers


class Layer(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self):
        return self.output


class Model(nn.Module):
    def __init__(self, *outputs, **lists):
        super().__init__()
        self.layers = nn.ModuleList(Layer(o) for o in outputs)
        for name, length in lists.items():
            setattr(self, name, nn.ModuleList(nn.Identity() for _ in range(length)))


def test_the_list_of_the_right_length_is_found():
    model = Model(*[torch.zeros(1, 4)] * 3, experts=8)
    assert find_decoder_layers(model, 3) is model.layers


def test_a_multimodal_model_is_searched_in_its_language_model():
    inner = Model(*[torch.zeros(1, 4)] * 3)
    outer = Model(vision=3)
    outer.get_language_model = lambda: inner
    assert find_decoder_layers(outer, 3) is inner.layers


@pytest.mark.parametrize("model", [Model(vision=3), Model(*[torch.zeros(1, 4)] * 2, other=2)])
def test_none_or_several_are_refused(model):
    with pytest.raises(ArmError, match="expected one list of 2 decoder layers"):
        find_decoder_layers(model, 2)


TOKENS = torch.zeros(3, 4)


@pytest.mark.parametrize("output", [TOKENS, (TOKENS, TOKENS), (TOKENS, None)])
def test_layers_that_can_be_armed(output):
    model = Model(output)
    arm(model.layers, [0], 4)
    model.layers[0]()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ((TOKENS, TOKENS, TOKENS), "returns tuple"),
        ({"hidden": TOKENS}, "returns dict"),
        (torch.zeros(2, 3, 4), r"returns \(2, 3, 4\), not \[tokens, 4\]"),
        ((TOKENS, torch.zeros(3, 8)), r"returns \(3, 8\)"),
    ],
)
def test_layers_that_cannot(output, says):
    model = Model(output)
    arm(model.layers, [0], 4)
    with pytest.raises(ArmError, match=says):
        model.layers[0]()
