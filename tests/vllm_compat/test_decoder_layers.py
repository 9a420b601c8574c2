"""Architectures that cannot be armed are refused by name, before anything is served."""

import pytest
import torch
from torch import nn

from sae_models import HookPoint
from steer_server.engine.vllm_compat.decoder_layers import ArmError, find_decoder_layers, find_places


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


def arm(layers, *points):
    for site, place in enumerate(find_places(layers, points or [HookPoint(0)], 4)):
        place.arm(site)


TOKENS = torch.zeros(3, 4)


@pytest.mark.parametrize("output", [TOKENS, (TOKENS, TOKENS), (TOKENS, None), TOKENS[None]])
def test_layers_that_can_be_armed(output):
    model = Model(output)
    arm(model.layers)
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
    arm(model.layers)
    with pytest.raises(ArmError, match=says):
        model.layers[0]()


class Block(nn.Module):
    """A decoder layer whose attention and MLP return what they are told to."""

    def __init__(self, **modules):
        super().__init__()
        for name, output in modules.items():
            setattr(self, name, output if isinstance(output, nn.Module) else Child(output))

    def forward(self, hidden_states):
        for child in self.children():
            child(hidden_states)
        return hidden_states


class Child(Layer):
    def forward(self, x):
        return self.output


class Linear(nn.Module):
    """What the place of a sum over tensor-parallel ranks is seen by."""

    tp_size, reduce_results = 2, False


@pytest.mark.parametrize(
    ("kind", "modules", "says"),
    [
        ("attn_out", {"mlp": TOKENS}, "no module named self_attn, attn, attention, self_attention; its modules: mlp"),
        ("mlp_out", {"self_attn": TOKENS}, "no module named mlp, .*; its modules: self_attn"),
        ("mlp_in", {}, "no module named mlp, .*; its modules: none"),
        ("resid_mid", {}, r"blocks\.0\.hook_resid_mid cannot be armed"),
    ],
)
def test_what_was_looked_for_is_named(kind, modules, says):
    with pytest.raises(ArmError, match=says):
        arm([Block(**modules)], HookPoint(0, kind))


def test_a_layer_without_the_usual_argument_has_no_input():
    with pytest.raises(ArmError, match=r"hook_resid_pre: the forward of Child takes no hidden_states; it takes: x"):
        arm([Child(TOKENS)], HookPoint(0, "resid_pre"))


@pytest.mark.parametrize(
    ("kind", "output", "says"),
    [
        ("attn_out", (TOKENS, TOKENS), "Child returns tuple, not"),
        ("mlp_out", torch.zeros(3, 8), r"Child returns \(3, 8\), not"),
        ("attn_out", None, "Child returns NoneType, not"),
    ],
)
def test_outputs_that_are_no_stream(kind, output, says):
    block = Block(self_attn=output, mlp=output)
    arm([block], HookPoint(0, kind))
    with pytest.raises(ArmError, match=says):
        block(TOKENS)


def test_an_input_that_is_no_stream():
    block = Block(mlp=TOKENS)
    arm([block], HookPoint(0, "mlp_in"))
    with pytest.raises(ArmError, match=r"Child is given \(3, 8\), not \[tokens, 4\]"):
        block(torch.zeros(3, 8))


@pytest.mark.parametrize(("kind", "name"), [("attn_out", "self_attn"), ("mlp_out", "mlp")])
def test_a_sum_that_is_left_to_the_layer_is_refused(kind, name):
    """As in vLLM's Cohere, which adds up attention and MLP before it adds up the ranks."""
    child = Child(TOKENS)
    child.o_proj = Linear()
    with pytest.raises(ArmError, match=r"Child\.o_proj leaves the sum .* --tensor-parallel-size 1"):
        arm([Block(**{name: child})], HookPoint(0, kind))
    child.o_proj.reduce_results = True
    arm([Block(**{name: child})], HookPoint(0, kind))


def test_the_norm_behind_counts_where_there_is_one():
    """`post_attention_layernorm` is that only where the MLP has a norm of its own before it."""
    norms = {"post_attention_layernorm": TOKENS, "self_attn": TOKENS, "mlp": TOKENS}
    gemma = Block(**norms, pre_feedforward_layernorm=TOKENS, post_feedforward_layernorm=TOKENS)
    glm = Block(**norms, post_self_attn_layernorm=TOKENS, post_mlp_layernorm=TOKENS)
    llama = Block(**norms)
    found = {
        name: [place.module for place in find_places([block], [HookPoint(0, "attn_out"), HookPoint(0, "mlp_out")], 4)]
        for name, block in {"gemma": gemma, "glm": glm, "llama": llama}.items()
    }
    assert found["gemma"] == [gemma.post_attention_layernorm, gemma.post_feedforward_layernorm]
    assert found["glm"] == [glm.post_self_attn_layernorm, glm.post_mlp_layernorm]
    assert found["llama"] == [llama.self_attn, llama.mlp]
