"""What streaming with vLLM's offline class relies on."""

import inspect


def test_prompts_are_rendered_one_at_a_time():
    from vllm import LLM

    assert "chat_template_kwargs" in inspect.signature(LLM._preprocess_chat_one).parameters
    assert list(inspect.signature(LLM._preprocess_cmpl_one).parameters)[:2] == ["self", "prompt"]
    assert "self.request_counter" in inspect.getsource(LLM)


def test_the_engine_is_stepped_by_hand():
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    assert list(inspect.signature(LLMEngine.add_request).parameters)[1:4] == ["request_id", "prompt", "params"]
    assert list(inspect.signature(LLMEngine.abort_request).parameters)[1:] == ["request_ids", "internal"]
    assert {"step", "has_unfinished_requests", "get_num_unfinished_requests"} <= set(dir(LLMEngine))
    assert RequestOutputKind.DELTA


def test_defaults_of_a_model():
    from vllm.config import ModelConfig

    assert list(inspect.signature(ModelConfig.get_diff_sampling_param).parameters) == ["self"]
