"""vLLM's own choosers of CUDA graphs: which graphs a step runs in. What is captured, and replayed, is in
`graph_capture_cases.py`, which needs Triton."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steer_server.engine.admission import Admission
from steer_server.engine.config import ModelFacts, parse_options, resolve_config
from steer_server.engine.vllm_compat.armed_model import ArmedModel
from steer_server.engine.vllm_compat.cuda_graphs import OP_NAME, choose_graphs_for, split_at_the_op
from steer_server.engine.worker import WorkerSteering
from tests.tensors import inline

DECODE = [(1, 1), (3, 4), (8, 8)]
"""(requests, the tokens of the graph that they need)."""


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
    armed.steering.expect_step(["other", "steered"])


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
def test_without_graphs_of_its_own_a_steered_decode_step_is_not_replayed_whole(choose, armed, requests, graph):
    assert choose(requests, requests, True) == ("FULL", graph)
    steer_one_request(armed)
    assert choose(requests, requests, True) == ("PIECEWISE", graph)
    armed.steering.expect_step(["other"])
    assert choose(requests, requests, True) == ("FULL", graph)
    assert not armed.steering.replays_whole


def test_nor_is_one_whose_stream_is_captured(choose, armed):
    armed.steering.in_graphs = True
    armed.steering.capture(["blocks.1.hook_resid_post"])
    steer_one_request(armed)
    assert choose(2, 2, True) == ("PIECEWISE", 2)
    armed.steering.capture([])
    assert choose(2, 2, True) == ("FULL", 2)


def test_other_steps_are_run_as_they_were(choose, armed):
    plain = [choose(1, 5, False), choose(2, 100, False)]
    assert plain == [("PIECEWISE", 8), ("NONE", 100)]
    for armed.steering.in_graphs in (False, True):
        steer_one_request(armed)
        assert [choose(1, 5, False), choose(2, 100, False)] == plain
        assert not armed.steering.replays_whole


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


@pytest.mark.interprets
def test_graphs_of_steered_forwards():
    root = Path(__file__).parents[2]
    cases = Path(__file__).with_name("graph_capture_cases.py")
    path = os.pathsep.join([str(root / "tests" / "e2e" / "interpreted"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout.strip().splitlines()[-1])
    assert passed is not None
    assert int(passed[1]) >= 21
