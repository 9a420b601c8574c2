"""Every place where vLLM is touched: there, as we know it, and replaced. A new vLLM release fails here first."""

import importlib
from types import SimpleNamespace

import pytest

from steer_server.engine.vllm_compat.patching import SeamMovedError, is_wrapped, wrap
from steer_server.plugin import register

SEAMS = [
    ("vllm.engine.arg_utils", "EngineArgs", "create_engine_config"),
    ("vllm.config.vllm", "VllmConfig", "compute_hash"),
    ("vllm.v1.engine.input_processor", "InputProcessor", "__init__"),
    ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs"),
    ("vllm.v1.engine.output_processor", "OutputProcessor", "add_request"),
    ("vllm.v1.engine.output_processor", "OutputProcessor", "process_outputs"),
    ("vllm.v1.engine.output_processor", "RequestState", "make_request_output"),
    ("vllm.v1.core.kv_cache_utils", None, "generate_block_hash_extra_keys"),
    ("vllm.v1.core.block_pool", None, "generate_block_hash_extra_keys"),
    ("vllm.v1.simple_kv_offload.manager", None, "generate_block_hash_extra_keys"),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "update_from_output"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "load_model"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_update_states"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_model_forward"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "sample_tokens"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "execute_model"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_dummy_run"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_warmup_and_capture"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "capture_model"),
    ("vllm.v1.worker.gpu_model_runner", "AsyncGPUModelRunnerOutput", "get_output"),
    ("vllm.v1.worker.gpu.async_utils", "AsyncOutput", "get_output"),
    ("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager", "capture"),
    ("vllm.v1.worker.gpu.cudagraph_utils", "ModelCudaGraphManager", "capture"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "sync_and_gather_intermediate_tensors"),
    ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner", "load_model"),
    ("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher", "dispatch"),
    ("vllm.v1.worker.gpu.dp_utils", None, "dispatch_cg_and_sync_dp"),
    ("vllm.v1.worker.gpu.model_runner", None, "dispatch_cg_and_sync_dp"),
    ("vllm.v1.worker.gpu.model_states", None, "resolve_model_state_cls"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "execute_model"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "sample_tokens"),
    ("vllm.v1.worker.gpu_worker", "Worker", "compile_or_warm_up_model"),
    ("vllm.v1.worker.cpu_worker", "CPUWorker", "compile_or_warm_up_model"),
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat", "create_chat_completion"),
    ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion", "create_completion"),
    ("vllm.entrypoints.openai.responses.serving", "OpenAIServingResponses", "create_responses"),
]


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


@pytest.mark.parametrize(("module", "owner", "name"), SEAMS, ids=[f"{o or m}.{n}" for m, o, n in SEAMS])
def test_seam_is_in_place(module, owner, name):
    imported = importlib.import_module(module)
    assert is_wrapped(getattr(imported, owner) if owner else imported, name)


def test_registering_again_changes_nothing():
    from vllm.v1.core.sched.scheduler import Scheduler

    before = Scheduler.update_from_output
    register()
    assert Scheduler.update_from_output is before


def test_a_moved_seam_is_loud():
    class Moved:
        def renamed(self):
            """What used to be called `method`."""

        def method_with(self, other):
            """Takes another parameter than it did."""

    with pytest.raises(SeamMovedError, match="has no method"):
        wrap(Moved, "method", (), lambda original: None)
    with pytest.raises(SeamMovedError, match="takes no request"):
        wrap(Moved, "method_with", ("request",), lambda original: None)


def test_names_that_are_used_without_being_replaced():
    """Attributes and fields that the wrappers read."""
    import inspect

    from vllm import LLM
    from vllm.forward_context import set_forward_context
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    from vllm.v1.worker.worker_base import WorkerBase

    assert "skip_compiled" in inspect.signature(set_forward_context).parameters
    assert {"kv_transfer_params", "request_id"} <= set(EngineCoreOutput.__struct_fields__)
    assert "extra_args" in SamplingParams.__struct_fields__
    assert {"ABORT", "ERROR"} <= set(FinishReason.__members__)
    assert "_model_runner_output" in inspect.getsource(AsyncGPUModelRunnerOutput.__init__)
    assert "num_computed_tokens_cpu" in inspect.getsource(InputBatch)
    assert "num_prompt_tokens" in inspect.getsource(Request.__init__)
    no_adapters = inspect.signature(LoRAModelRunnerMixin._set_active_loras)
    assert list(no_adapters.parameters)[1:4] == ["prompt_lora_mapping", "token_lora_mapping", "lora_requests"]
    assert "scheduled_spec_decode_tokens" in SchedulerOutput.__dataclass_fields__
    assert {"req_id_to_index", "sampled_token_ids"} <= set(ModelRunnerOutput.__dataclass_fields__)
    # Attributes of our own are set on these.
    for holder in (ModelRunnerOutput([], {}), RequestOutput("r", None, None, None, [], True)):
        holder.steering_probe = 1
    for method in ("steering_self_test", "steering_capture", "steering_take_captured"):
        assert hasattr(WorkerBase, method)
    assert callable(LLM.collective_rpc)
    assert "prompt_logprobs" in SamplingParams.__struct_fields__


def test_names_of_the_v2_runner():
    """What `runner_v2` reads, and the methods of every ModelState that it may find itself on top of."""
    import dataclasses
    import inspect

    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.async_utils import AsyncOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.model_states.interface import ModelState
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

    def parameters(function):
        return list(inspect.signature(function).parameters)[1:]

    for state in (ModelState, DefaultModelState, MambaHybridModelState):
        assert parameters(state.__init__) == ["vllm_config", "model", "encoder_cache", "device"]
        assert parameters(state.add_request) == ["req_index", "new_req_data"]
        assert parameters(state.remove_request) == ["req_id"]
        assert parameters(state.preprocess_state)[0] == "input_batch"
    fields = {field.name for field in dataclasses.fields(InputBatch)}
    assert {"req_ids", "num_reqs", "num_computed_tokens_np", "num_scheduled_tokens", "seq_lens"} <= fields
    assert "model_runner_output" in parameters(AsyncOutput.__init__)
    assert {"req_id", "sampling_params"} <= {field.name for field in dataclasses.fields(NewRequestData)}
    assert isinstance(NewRequestData.prompt_len, property)
    assert isinstance(GPUModelRunner.armed, property)


@pytest.mark.parametrize(
    ("module", "name", "method"),
    [
        ("mamba_mixer", "MambaMixer", "forward_impl"),
        ("mamba_mixer2", "MambaMixer2", "conv_ssm_forward"),
        ("short_conv", "ShortConv", "forward_cuda"),
        ("linear.minimax_linear_attn", "MiniMaxText01LinearAttention", "_forward"),
        ("linear.bailing_linear_attn", "BailingMoELinearAttention", "_forward"),
        ("gdn.kimi_gdn_linear_attn", "KimiGatedDeltaNetAttention", "_forward"),
        ("gdn.olmo_gdn_linear_attn", "OlmoHybridGatedDeltaNetAttention", "_full_forward"),
        ("gdn.qwen_gdn_linear_attn", "QwenGatedDeltaNetAttention", "_forward_core"),
    ],
)
def test_what_mixes_tokens_writes_to_an_output_that_the_self_test_knows(module, name, method):
    import inspect

    from vllm.model_executor.layers.mamba.abstract import MambaBase

    from steer_server.engine.vllm_compat.self_test_forwards import OUTPUTS, STATE_SPACE_METHODS

    mixer = getattr(importlib.import_module(f"vllm.model_executor.layers.mamba.{module}"), name)
    assert issubclass(mixer, MambaBase)
    assert method in STATE_SPACE_METHODS
    assert set(OUTPUTS) & set(inspect.signature(getattr(mixer, method)).parameters)


def test_the_plan_crosses_vllms_wire_and_its_owner_stays():
    """`extra_args` goes through vLLM's msgpack: our dict arrives as a plain one, without whom it belongs to."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from steer_server.engine.vllm_compat.engine_core import wire_plan
    from steer_server.engine.vllm_compat.frontend import WirePlan

    params = SamplingParams(extra_args={"steering": WirePlan(SimpleNamespace(encoded_plan=b"\x01plan"))})
    request = EngineCoreRequest("r", [1], None, params, None, 0.0, None, None, None)
    received = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))
    assert wire_plan(received.sampling_params) == b"\x01plan"
    assert type(received.sampling_params.extra_args["steering"]) is dict
    assert wire_plan(SamplingParams()) is None
    assert wire_plan(None) is None


def test_a_request_that_was_not_admitted_does_not_reach_the_engine():
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor

    params = SamplingParams(extra_args={"steering": {"features": []}})
    request = EngineCoreRequest("r", [1], None, params, None, 0.0, None, None, None, external_req_id="r")
    with pytest.raises(ValueError, match="was not admitted"):
        OutputProcessor(None, log_stats=False).add_request(request, None)


def test_rejected_drafts_are_not_counted():
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

    from steer_server.engine.vllm_compat.engine_core import _without_rejected

    step = SchedulerOutput.make_empty()
    step.scheduled_spec_decode_tokens = {"three of four": [5, 6, 7, 8], "none": [5, 6], "all": [5, 6]}
    output = ModelRunnerOutput(
        ["plain", "three of four", "none", "all"],
        {"plain": 0, "three of four": 1, "none": 2, "all": 3},
        sampled_token_ids=[[1], [5, 6, 7, 1], [1], [5, 6, 1]],
    )
    spans = {"plain": (9, 12), "three of four": (20, 25), "none": (20, 23), "all": (20, 23)}
    kept = {name: _without_rejected(span, name, step, output) for name, span in spans.items()}
    assert kept == {"plain": (9, 12), "three of four": (20, 24), "none": (20, 21), "all": (20, 23)}
