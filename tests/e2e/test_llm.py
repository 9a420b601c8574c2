"""`SteeredLLM`: vLLM's own answers, with receipts, in one call; and streamed."""

import re

import pytest

from tests.e2e.cases import direction
from tests.tensors import inline

pytestmark = pytest.mark.engine

SAE = "smollm2-135m/l15"
SEA = {"features": [{"sae": SAE, "index": 4290, "op": "set", "value": 59}]}
ADD = {"vectors": [{"data": inline(direction(1, 8.0)), "layers": [12], "op": "add", "strength": 2.0}]}
QUESTION = "Tell me about your weekend."
GREEDY = {"temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def llm(saes):
    from steer_server import SteeredLLM

    with SteeredLLM(saes={"test/jumprelu": saes["test/jumprelu"]}, enforce_eager=True, max_num_seqs=16) as started:
        yield started


def tokens_of(receipt):
    return [entry["tokens"] + entry["cached"] for entry in receipt["applied"]]


def test_chat_is_vllms_chat(llm):
    from vllm import SamplingParams

    params = SamplingParams(**GREEDY, extra_args={"steering": SEA})
    (expected,) = llm.vllm.chat([{"role": "user", "content": QUESTION}], params, use_tqdm=False)
    answer = llm.chat(QUESTION, steering=SEA, **GREEDY)
    assert str(answer) == answer.text == expected.outputs[0].text
    assert answer.prompt_tokens == len(expected.prompt_token_ids)
    assert tokens_of(answer.receipt) == tokens_of(expected.steering) == [answer.prompt_tokens + 16 - 1 - 1]
    assert answer.receipt["fingerprint"] == expected.steering["fingerprint"]


def test_a_list_of_prompts_each_steered_in_its_own_way(llm):
    specs = [None, SEA, ADD]
    together = llm.generate(["The weekend was"] * 3, steering=specs, **GREEDY)
    alone = [llm.generate("The weekend was", steering=spec, **GREEDY) for spec in specs]
    assert [a.text for a in together] == [a.text for a in alone]
    assert len({a.text for a in together}) == 3
    assert together[0].receipt is None
    assert [a.receipt["applied"][0]["op"] for a in together[1:]] == ["set", "add"]


def test_one_steering_for_all_and_several_choices(llm):
    conversations = [[{"role": "user", "content": QUESTION}], [{"role": "user", "content": "Hello"}]]
    answers = llm.chat(conversations, steering=ADD, n=2, temperature=0.9, seed=3, max_tokens=5)
    assert [len(a.choices) for a in answers] == [2, 2]
    for answer in answers:
        assert tokens_of(answer.receipt) == [2 * (answer.prompt_tokens + 4)]


def test_tokens_as_a_prompt(llm):
    ids = llm.vllm.get_tokenizer().encode("The weekend was")
    answer = llm.generate({"prompt_token_ids": ids}, steering=SEA, **GREEDY)
    assert answer.text == llm.generate("The weekend was", steering=SEA, **GREEDY).text


@pytest.mark.parametrize("spec", [None, SEA])
@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_says_the_same_in_pieces(llm, spec, chat):
    whole = (llm.chat if chat else llm.generate)(QUESTION, steering=spec, **GREEDY)
    chunks = list(llm.stream(QUESTION, chat=chat, steering=spec, **GREEDY))
    assert len(chunks) > 5
    assert "".join(map(str, chunks)) == whole.text
    assert tuple(t for c in chunks for t in c.token_ids) == whole.choices[0].token_ids
    assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    receipts = [c.receipt for c in chunks]
    assert receipts[:-1] == [None] * (len(chunks) - 1)
    assert (receipts[-1] is None) == (spec is None)
    if spec is not None:
        assert tokens_of(receipts[-1]) == tokens_of(whole.receipt)


def test_a_stream_that_is_left_stops(llm):
    stream = llm.stream(QUESTION, steering=SEA, temperature=0, max_tokens=1000)
    next(stream)
    with pytest.raises(RuntimeError, match="a stream is open"):
        llm.chat(QUESTION)
    stream.close()
    assert llm.vllm.llm_engine.get_num_unfinished_requests() == 0
    assert llm.chat(QUESTION, steering=SEA, **GREEDY).receipt is not None


def test_what_cannot_be_done_says_so(llm):
    wrong = {"features": [{"sae": SAE, "index": 10**6, "op": "ablate"}]}
    for call in (llm.chat, llm.generate, lambda *a, **k: list(llm.stream(*a, **k))):
        with pytest.raises(ValueError, match=re.escape("steering.features[0].index")):
            call(QUESTION, steering=wrong)
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate([QUESTION], steering=[SEA, SEA])
    with pytest.raises(ValueError, match="n must be 1"):
        llm.stream(QUESTION, n=2).__next__()
    with pytest.raises(TypeError, match="temprature"):
        llm.chat(QUESTION, temprature=1)
    assert llm.chat(QUESTION, **GREEDY).receipt is None


def test_shown_in_a_notebook(llm):
    shown = llm.chat(QUESTION, steering=SEA, **GREEDY)._repr_html_()
    assert f"feature {SAE}/4290" in shown
    assert "layers 15" in shown
    never = [{"feature": {"sae": SAE, "index": 4290}, "op": ">", "value": 1e6}]
    answer = llm.chat(QUESTION, steering=SEA | {"when": never}, **GREEDY)
    closed = answer.receipt["applied"][0]["closed"]
    assert f"set on 0 tokens, not on {closed} where a condition did not hold at" in answer._repr_html_()
    assert answer.text == llm.chat(QUESTION, **GREEDY).text
    assert "not steered" in llm.generate("1 < 2", **GREEDY)._repr_html_()


def test_an_sae_of_ones_own(llm):
    spec = {"features": [{"sae": "test/jumprelu", "index": 3, "op": "set", "value": 9.0}]}
    assert llm.chat(QUESTION, steering=spec, **GREEDY).receipt["applied"][0]["source"] == "feature test/jumprelu/3"
