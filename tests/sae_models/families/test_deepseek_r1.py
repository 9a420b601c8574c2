"""qresearch's SAEs of DeepSeek-R1 distillations."""

import pytest

from sae_models import HookPoint
from tests.sae_models.conformance import assert_close, assert_conforms, cases
from tests.sae_models.pickles import (
    assert_a_server_refuses,
    assert_every_damage_is_named,
    load_pickled,
    refusal,
)

CASES = {parameter.id: parameter.values[0] for parameter in cases("deepseek_r1")}
TENSORS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


@pytest.mark.parametrize("name", CASES)
def test_it_does_what_the_notebook_says(name):
    expected = CASES[name]
    sae = load_pickled(expected.checkpoint)
    assert_conforms(sae, expected)
    assert_close(sae.encode(expected.x), expected.tensors["saelens_activations"])
    model = {
        "llama_8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "llama_70b": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
        "llama_1b": "meta-llama/Llama-3.2-1B-Instruct",
    }[name]
    assert (sae.architecture, sae.selection, sae.model_name) == ("relu", None, model)


@pytest.mark.parametrize("name", CASES)
def test_it_reads_what_enters_the_layer(name):
    """qresearch's notebook encodes `inputs[0]` of decoder layer n; SAELens says the output of layer n.

    The notebook is the only code of those who trained it, so the place is the output of layer n - 1.
    """
    layer = {"llama_8b": 19, "llama_70b": 48, "llama_1b": 9}[name]
    expected = CASES[name]
    sae = load_pickled(expected.checkpoint)
    assert (sae.hook_points, sae.hook_points_out) == ((HookPoint(layer - 1),), (HookPoint(layer - 1),))
    assert expected.metadata["saelens_hook_name"] == f"blocks.{layer}.hook_resid_post"
    as_saelens = load_pickled(f"{expected.checkpoint}?hook={expected.metadata['saelens_hook_name']}")
    assert as_saelens.hook_point == HookPoint(layer)


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    assert_every_damage_is_named(CASES["llama_8b"].checkpoint, TENSORS, tmp_path)
    assert "option k=3 has no use" in refusal(f"{CASES['llama_8b'].checkpoint}?k=3")


@pytest.mark.parametrize("name", CASES)
def test_a_server_refuses_it(name):
    assert_a_server_refuses(CASES[name].checkpoint)
