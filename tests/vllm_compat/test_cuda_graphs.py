"""vLLM's own choosers of CUDA graphs: a whole forward is replayed where nobody is steered, and nowhere else."""

import pytest
import torch

from steer_server.engine.admission import Admission
from steer_server.engine.config import ModelFacts, parse_options, resolve_config
from steer_server.engine.vllm_compat.armed_model import ArmedModel
from steer_server.engine.vllm_compat.cuda_graphs import OP_NAME, choose_graphs_for, split_at_the_op
from steer_server.engine.worker import WorkerSteering
from tests.e2e.tiny_models import LLAMA, tiny
from tests.tensors import inline

SIZES = [1, 2, 4, 8]
DECODE = [(1, 1), (3, 4), (8, 8)]
"""(requests, the tokens of the graph that they need)."""


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory, process_group):
    """As a GPU has it: compiled, with CUDA graphs of SIZES."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs

    model = tiny(tmp_path_factory.mktemp("llama"), LLAMA)
    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "float32", "max_num_seqs": 8}
    config = EngineArgs(str(model), **settings).create_engine_config()
    compilation = config.compilation_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, SIZES[-1]
    split_at_the_op(compilation)
    return config


@pytest.fixture
def armed():
    """A worker with nothing to do yet."""
    config = resolve_config(
        parse_options({}), ModelFacts("m", 8, 2, max_num_seqs=8, max_num_batched_tokens=64, frontends=1)
    )
    return ArmedModel(WorkerSteering(config, torch.float32, torch.device("cpu")), [])


def steer_one_request(armed):
    vector = {"data": inline(torch.ones(8)), "layers": [1], "op": "add", "strength": 1.0}
    plan = Admission(armed.steering.config).admit({"vectors": [vector]}).plan
    armed.steering.add_request("steered", plan, 3)


def v1_chooser(vllm_config, armed):
    from vllm.config import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    dispatcher = CudagraphDispatcher(vllm_config)
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)
    choose_graphs_for(armed, dispatcher)

    def choose(requests, tokens, decode):
        mode, batch = dispatcher.dispatch(num_tokens=tokens, uniform_decode=decode)
        return mode.name, batch.num_tokens

    return choose


def v2_chooser(vllm_config, armed):
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    # A CPU has neither a pool of graphs, which a manager with a mode asks for at once, nor graphs to capture.
    manager = ModelCudaGraphManager(vllm_config, torch.device("cpu"), CUDAGraphMode.NONE, 1)
    manager.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    manager._init_candidates()
    manager._graphs_captured = True
    choose_graphs_for(armed, manager)

    def choose(requests, tokens, decode):
        # By the module, as vLLM's runner calls what it has imported.
        length = 1 if decode else None
        batch, _ = model_runner.dispatch_cg_and_sync_dp(
            manager, requests, tokens, length, dp_size=1, dp_rank=0, max_query_len=length
        )
        return batch.cg_mode.name, batch.num_tokens

    return choose


@pytest.fixture(params=[v1_chooser, v2_chooser], ids=["V1", "V2"])
def choose(request, vllm_config, armed):
    return request.param(vllm_config, armed)


@pytest.mark.parametrize(("requests", "graph"), DECODE)
def test_a_steered_decode_step_is_not_replayed_whole(choose, armed, requests, graph):
    assert choose(requests, requests, True) == ("FULL", graph)
    steer_one_request(armed)
    assert choose(requests, requests, True) == ("PIECEWISE", graph)
    armed.steering.remove_request("steered")
    assert choose(requests, requests, True) == ("FULL", graph)


def test_nor_is_one_whose_stream_is_captured(choose, armed):
    armed.steering.capture(["blocks.1.hook_resid_post"])
    assert choose(2, 2, True) == ("PIECEWISE", 2)
    armed.steering.capture([])
    assert choose(2, 2, True) == ("FULL", 2)


def test_other_steps_are_run_as_they_were(choose, armed):
    plain = [choose(1, 5, False), choose(2, 100, False)]
    assert plain == [("PIECEWISE", 8), ("NONE", 100)]
    steer_one_request(armed)
    assert [choose(1, 5, False), choose(2, 100, False)] == plain


def test_a_chooser_that_nothing_arms_is_vllms(vllm_config):
    """A drafting model's, or that of a server that nothing steers."""
    assert v1_chooser(vllm_config, None)(2, 2, True) == ("FULL", 2)
    assert v2_chooser(vllm_config, None)(2, 2, True) == ("FULL", 2)


def test_the_compiled_graph_is_split_at_the_op():
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    def after(**settings):
        compilation = CompilationConfig(**settings)
        split_at_the_op(compilation)
        return compilation

    modes = {
        CUDAGraphMode.FULL: CUDAGraphMode.FULL_AND_PIECEWISE,
        CUDAGraphMode.FULL_DECODE_ONLY: CUDAGraphMode.FULL_AND_PIECEWISE,
        CUDAGraphMode.FULL_AND_PIECEWISE: CUDAGraphMode.FULL_AND_PIECEWISE,
        CUDAGraphMode.PIECEWISE: CUDAGraphMode.PIECEWISE,
    }
    for splits in (None, [], ["vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"]):
        for mode, changed_mode in modes.items():
            changed = after(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=mode, splitting_ops=splits)
            assert changed.cudagraph_mode == changed_mode
            assert set(changed.splitting_ops) >= {OP_NAME, "vllm::unified_attention_with_output", *(splits or [])}
            assert len(set(changed.splitting_ops)) == len(changed.splitting_ops)
            assert changed.splitting_ops_contain_attention()
    cpu = after(mode=CompilationMode.DYNAMO_TRACE_ONCE, cudagraph_mode=CUDAGraphMode.NONE)
    assert cpu.splitting_ops is None
