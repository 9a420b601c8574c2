"""What tests of vLLM's own classes share."""

import pytest

from steer_server.engine.vllm_compat.cuda_graphs import split_at_the_op
from steer_server.plugin import register
from tests.e2e.tiny_models import LLAMA, tiny

GRAPH_SIZES = [1, 2, 4, 8]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """One of this process alone, which vLLM's layers and choosers ask for their rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    register()
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory, process_group):
    """As a GPU has it: compiled, with CUDA graphs of GRAPH_SIZES."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs

    model = tiny(tmp_path_factory.mktemp("llama"), LLAMA)
    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "float32", "max_num_seqs": 8}
    config = EngineArgs(str(model), **settings).create_engine_config()
    compilation = config.compilation_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = GRAPH_SIZES, GRAPH_SIZES[-1]
    split_at_the_op(compilation)
    return config
