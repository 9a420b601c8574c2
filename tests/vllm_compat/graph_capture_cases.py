"""CUDA graphs of steered forwards, captured and replayed by vLLM's own managers. `test_cuda_graphs.py` runs this where
Triton interprets; what stands for a CUDA graph there is `tests/launch_recorder.py`.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steer_kernels.apply_edits import apply_edits
from steer_server.engine.admission import Admission
from steer_server.engine.config import ModelFacts, parse_options, resolve_config
from steer_server.engine.vllm_compat import cuda_graphs
from steer_server.engine.vllm_compat.armed_model import ArmedModel
from steer_server.engine.vllm_compat.cuda_graphs import choose_graphs_for
from steer_server.engine.whole_forwards import Graphs
from steer_server.engine.worker import WorkerSteering
from tests.launch_recorder import RecordedGraph
from tests.oracle.oracle_sae import OracleSAE
from tests.sae_models.build import build_sae
from tests.tensors import inline
from tests.vllm_compat.conftest import GRAPH_SIZES

D_MODEL, LAYERS, VOCABULARY = 8, 3, 11


class Model(torch.nn.Module):
    """What vLLM's managers see of a model. A token depends on no other, as in the self-test."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.randn(VOCABULARY, D_MODEL, generator=generator)
        self.layers = [torch.randn(D_MODEL, D_MODEL, generator=generator) for _ in range(LAYERS)]
        self.leaves_out = set()

    def forward(self, input_ids, **_):
        h = self.embedding[input_ids]
        for site, W in enumerate(self.layers):
            h = h + torch.tanh(h @ W)
            if site not in self.leaves_out:
                apply_edits(h, None, site)
        return h


def expected(model, token, spec, saes):
    """One token's answer from the definition, in float64."""
    h = model.embedding[token].double()
    for layer, W in enumerate(model.layers):
        h = h + torch.tanh(h @ W.double())
        delta = torch.zeros_like(h)
        for entry in (spec or {}).get("vectors", []):
            if layer in entry["layers"]:
                delta += entry["strength"] * VECTOR.double()
        for entry in (spec or {}).get("features", []):
            sae = saes[entry["sae"]]
            if layer == 1:
                f = float(sae.encode(h.unsqueeze(0))[0, entry["index"]])
                delta += (entry["value"] * f - f) * sae.write(entry["index"], h.unsqueeze(0))[0]
        h = h + delta
    return h


VECTOR = torch.linspace(-1, 2, D_MODEL)
INLINE = inline(VECTOR)
SPECS = {
    "one layer": {"vectors": [{"data": INLINE, "layers": [1], "op": "add", "strength": 2.0}]},
    "all layers": {"vectors": [{"data": INLINE, "layers": [0, 1, 2], "op": "add", "strength": -1.0}]},
    "topk": {"features": [{"sae": "topk", "index": i, "op": "scale", "value": 3.0} for i in range(6)]},
    "generation": {
        "vectors": [{"data": INLINE, "layers": [2], "op": "add", "strength": 1.0}],
        "apply": {"phase": "generation"},
    },
    "prompt": {
        "vectors": [{"data": INLINE, "layers": [0], "op": "add", "strength": 1.0}],
        "apply": {"phase": "prompt"},
    },
}
PROMPT = 4


class Server:
    """A runner's steering, graphs and buffers, of vLLM 0.32's either version."""

    def __init__(self, folder, vllm_config, monkeypatch, model):
        topk = str(build_sae(folder / "topk", "topk", d_in=D_MODEL, layer=1))
        facts = ModelFacts("m", D_MODEL, LAYERS, max_num_seqs=8, max_num_batched_tokens=64, frontends=1)
        config = resolve_config(parse_options({"saes": {"topk": topk}, "max_edits": 8, "rows": 16}), facts)
        self.saes = {"topk": OracleSAE(topk)}
        self.model, self.vllm_config, self.monkeypatch = model, vllm_config, monkeypatch
        self.admission = Admission(config)
        self.armed = ArmedModel(WorkerSteering(config, torch.float32, torch.device("cpu")), [])
        self.steering = self.armed.steering
        self.input_ids = torch.zeros(64, dtype=torch.int64)
        self.specs, self.positions = {}, {}
        monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, *_, **__: graph.capture())
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)

    def add(self, name, spec):
        self.specs[name] = spec
        self.positions[name] = PROMPT
        if spec is not None:
            self.steering.add_request(name, self.admission.admit(spec).plan, PROMPT)

    def decode(self, *names):
        """One decode step; every token's answer is the definition's. What was replayed, and the report."""
        tokens = [(self.positions[name] * 7 + i) % VOCABULARY for i, name in enumerate(names)]
        self.input_ids[: len(names)] = torch.tensor(tokens)
        starts = np.array([self.positions[name] for name in names])
        replayed, output, report = self.step(names, starts)
        for name, token, found in zip(names, tokens, output, strict=False):
            spec = self.specs[name]
            acts = spec is not None and spec.get("apply", {}).get("phase") != "prompt"
            answer = expected(self.model, token, spec if acts else None, self.saes)
            assert torch.allclose(found.double(), answer, atol=1e-4), name
            self.positions[name] += 1
        return replayed, report

    @torch.inference_mode()
    def step(self, names, starts):
        """As the runners' seams have it. What was replayed, the model's answer, and the report."""
        steering = self.steering
        steering.expect_step(names)
        key = self.choose(len(names))
        steers = steering.has_work
        if steers:
            steering.begin_step(names, starts, np.ones(len(names), dtype=np.int64))
        output = self.run(key)
        if steers:
            steering.end_step()
        return kind(*key), output, steering.take_report()


def kind(mode, key):
    """What a forward was replayed from."""
    return mode.name, type(key).__name__.startswith("Steered")


class V1(Server):
    def __init__(self, *args):
        from vllm.compilation import cuda_graph
        from vllm.config import CUDAGraphMode
        from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        super().__init__(*args)
        self.monkeypatch.setattr(cuda_graph, "capture_pool", lambda *_: nullcontext())
        self.monkeypatch.setattr(cuda_graph, "current_stream", lambda: None)
        self.monkeypatch.setattr(cuda_graph.current_platform, "get_global_graph_pool", lambda: None, raising=False)
        self.monkeypatch.setattr(cuda_graph, "weak_ref_tensors", lambda tensors: tensors)
        runner = self.runner = object.__new__(GPUModelRunner)
        runner.vllm_config, runner.compilation_config = self.vllm_config, self.vllm_config.compilation_config
        runner.armed, runner.lora_config = self.armed, None
        runner.cudagraph_dispatcher = CudagraphDispatcher(self.vllm_config)
        runner.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)
        runner.model = cuda_graph.CUDAGraphWrapper(self.model, self.vllm_config, CUDAGraphMode.FULL)
        runner._dummy_run = self.dummy_run
        choose_graphs_for(self.armed, runner.cudagraph_dispatcher)

    def forward(self, tokens, mode, key):
        from vllm.forward_context import set_forward_context

        with set_forward_context(
            None, self.vllm_config, num_tokens=tokens, cudagraph_runtime_mode=mode, batch_descriptor=key
        ):
            return self.runner.model(self.input_ids[:tokens])

    def dummy_run(self, tokens, cudagraph_runtime_mode, uniform_decode=False, **_):
        from vllm.config import CUDAGraphMode

        mode, key = self.runner.cudagraph_dispatcher.dispatch(tokens, uniform_decode=uniform_decode)
        if cudagraph_runtime_mode != CUDAGraphMode.NONE:
            assert mode == cudagraph_runtime_mode
        self.forward(tokens, cudagraph_runtime_mode, key)

    def capture(self):
        from vllm.compilation.monitor import set_cudagraph_capturing_enabled
        from vllm.config import CUDAGraphMode

        def capture_model(runner):
            set_cudagraph_capturing_enabled(True)
            for mode, keys in runner.cudagraph_dispatcher.get_capture_descs():
                for key in keys if mode == CUDAGraphMode.FULL else []:
                    runner._warmup_and_capture(key, cudagraph_runtime_mode=mode, num_warmups=1)
            set_cudagraph_capturing_enabled(False)
            return 0

        cuda_graphs._capture_model_v1(capture_model, self.runner)

    def graphs(self):
        return list(self.runner.model.concrete_cudagraph_entries)

    def choose(self, tokens):
        return self.runner.cudagraph_dispatcher.dispatch(tokens, uniform_decode=True)

    def run(self, chosen):
        mode, key = chosen
        return self.forward(key.num_tokens, mode, key)


class V2(Server):
    def __init__(self, *args):
        from vllm.v1.worker.gpu import cudagraph_utils

        super().__init__(*args)
        for name in ("graph_capture", "capture_pool"):
            self.monkeypatch.setattr(cudagraph_utils, name, lambda *_, **__: nullcontext())
        self.monkeypatch.setattr(cudagraph_utils, "current_stream", lambda: None)
        self.monkeypatch.setattr(
            cudagraph_utils, "prepare_inputs_to_capture", lambda *_, **__: cudagraph_utils.AttentionState(None, {})
        )
        self.monkeypatch.setattr(cudagraph_utils, "has_compiled_submodule", lambda model: True)
        self.manager = self.new_manager()

    def new_manager(self):
        from vllm.config import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

        # A CPU has no pool of graphs, which a manager with a mode asks for at once.
        manager = ModelCudaGraphManager(self.vllm_config, torch.device("cpu"), CUDAGraphMode.NONE, 1)
        manager.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        manager._init_candidates()
        return manager

    def capture(self):
        from vllm.config import CUDAGraphMode

        piecewise = self.manager._capture_descs.pop(CUDAGraphMode.PIECEWISE)
        state = SimpleNamespace(armed=self.armed, prepare_dummy_inputs=lambda *_: {})
        buffers = SimpleNamespace(
            input_ids=self.input_ids, positions=torch.zeros(64), is_padding=torch.zeros(64, dtype=torch.bool)
        )
        self.manager.capture(self.model, state, buffers, None, None, [], None)
        self.manager._capture_descs[CUDAGraphMode.PIECEWISE] = piecewise

    def graphs(self):
        return list(self.manager.graphs)

    def choose(self, tokens, manager=None):
        from vllm.v1.worker.gpu import model_runner

        # By the module, as vLLM's runner calls what it has imported.
        manager = manager or self.manager
        key, _ = model_runner.dispatch_cg_and_sync_dp(manager, tokens, tokens, 1, 1, 0, max_query_len=1)
        return key.cg_mode, key

    def run(self, chosen):
        from vllm.config import CUDAGraphMode

        mode, key = chosen
        if mode == CUDAGraphMode.FULL:
            return self.manager.run_fullgraph(key)
        return self.model(self.input_ids[: key.num_tokens])


VANILLA, STEERED, PIECES = ("FULL", False), ("FULL", True), ("PIECEWISE", False)


@pytest.fixture(params=[V1, V2])
def server(request, tmp_path, vllm_config, monkeypatch):
    return request.param(tmp_path, vllm_config, monkeypatch, Model())


def settled(report):
    report = report.settled()
    return report.spans, report.missing_sites


def test_the_triton_device(server):
    assert server.steering.table is not None


def test_there_is_a_steered_graph_beside_each_of_vllms(server, caplog):
    server.capture()
    assert server.steering.in_graphs
    names = [type(key).__name__ for key in server.graphs()]
    assert len(names) == 2 * len(GRAPH_SIZES)
    assert sum(name.startswith("Steered") for name in names) == len(GRAPH_SIZES)
    assert server.steering.table.edited.tolist() == [len(GRAPH_SIZES)] * LAYERS


def test_requests_come_and_go(server):
    server.capture()
    for name in SPECS:
        server.add(name, SPECS[name])
    server.add("plain", None)
    assert server.decode("plain") == (VANILLA, None)
    replayed, report = server.decode("one layer", "plain")
    assert replayed == STEERED
    assert settled(report) == ({"one layer": (PROMPT, PROMPT + 1)}, [])
    # Others decode on, without it.
    assert server.decode("plain", "plain") == (VANILLA, None)
    replayed, report = server.decode("plain", "topk", "generation", "all layers", "one layer")
    assert (replayed, settled(report)[1]) == (STEERED, [])
    # The table of the step before is still there, and nothing in it may act.
    replayed, report = server.decode("prompt", "plain")
    assert (replayed, settled(report)) == (STEERED, ({"prompt": (PROMPT, PROMPT + 1)}, []))
    for _ in range(2):
        replayed, report = server.decode("topk")
        assert (replayed, settled(report)[1]) == (STEERED, [])
    for name in SPECS:
        server.steering.remove_request(name)
    assert server.decode("plain") == (VANILLA, None)


def test_what_a_graph_did_not_do_is_missing(server):
    """Were the launches gone, of one step: it would be known, and the next one is right again."""
    server.capture()
    server.add("all layers", SPECS["all layers"])
    table, replay = server.steering.table, RecordedGraph.replay
    with pytest.MonkeyPatch.context() as context:
        context.setattr(RecordedGraph, "replay", lambda graph: (table.token_group.fill_(-1), replay(graph)))
        _, _, report = server.step(["all layers"], np.array([PROMPT]))
    _, missing = settled(report)
    assert missing == [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]


def test_a_graph_without_a_launch_is_not_used(server, caplog):
    """Left out of the compiled graph, say."""
    server.model.leaves_out = {1}
    with caplog.at_level("WARNING", logger="vllm"):
        server.capture()
    assert not server.steering.in_graphs
    assert len(server.graphs()) == len(GRAPH_SIZES)
    server.model.leaves_out = set()
    server.add("one layer", SPECS["one layer"])
    replayed, report = server.decode("one layer")
    assert (replayed, settled(report)[1]) == (PIECES, [])


def failing_when_steered(server):
    captures = RecordedGraph.capture

    def capture(graph):
        if server.steering.graphs is Graphs.STEERED:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return captures(graph)

    return capture


def test_graphs_that_cannot_be_captured_are_done_without(server):
    with pytest.MonkeyPatch.context() as context:
        context.setattr(RecordedGraph, "capture", failing_when_steered(server))
        server.capture()
    assert not server.steering.in_graphs
    assert len(server.graphs()) == len(GRAPH_SIZES)
    server.add("all layers", SPECS["all layers"])
    assert server.decode("all layers")[0] == PIECES


def test_several_ranks_do_not_part_ways(server):
    """One that fails in the middle of a capture would leave the others waiting: the engine does not start."""
    server.vllm_config.parallel_config.tensor_parallel_size = 2
    try:
        with pytest.MonkeyPatch.context() as context:
            context.setattr(RecordedGraph, "capture", failing_when_steered(server))
            with pytest.raises(RuntimeError, match="operation not permitted"):
                server.capture()
    finally:
        server.vllm_config.parallel_config.tensor_parallel_size = 1


def test_launches_of_another_kind_than_the_graphs_have_are_missing(server):
    """Which nothing brings about: SAEs are ranked as their hook points say. Were it so, no stale rank would pass."""
    server.capture()
    server.add("topk", SPECS["topk"])
    server.steering.encoders.rankings.clear()
    replayed, _, report = server.step(["topk"], np.array([PROMPT]))
    assert (replayed, settled(report)[1]) == (STEERED, ["blocks.1.hook_resid_post"])


def test_what_the_graphs_have_no_room_for_runs_between_pieces(server):
    """Requests that share their rows, so that the bank holds more edits than the table."""
    server.capture()
    names = [f"all layers {i}" for i in range(6)]
    for name in names:
        server.add(name, SPECS["all layers"])
    held = server.steering.table.nbytes
    for n, expected_graphs in ((5, STEERED), (6, PIECES), (5, STEERED), (1, STEERED), (6, PIECES)):
        replayed, report = server.decode(*names[:n])
        assert (replayed, settled(report)[1]) == (expected_graphs, [])
    assert server.steering.table.nbytes == held


def test_a_stream_is_captured_between_pieces(server):
    server.capture()
    server.add("one layer", SPECS["one layer"])
    server.steering.capture(["blocks.2.hook_resid_post"])
    assert server.decode("one layer")[0] == PIECES
    (stream,) = server.steering.take_captured()
    assert stream.shape == (1, D_MODEL)


def test_a_drafting_model_keeps_vllms_graphs(tmp_path, vllm_config, monkeypatch):
    """It reads its prompt in the batch of the steered one and pads as that does, but has no sites."""
    server = V2(tmp_path, vllm_config, monkeypatch, Model())
    server.capture()
    server.add("one layer", SPECS["one layer"])
    drafting = server.new_manager()
    drafting._graphs_captured = True
    choose_graphs_for(server.armed, drafting)
    server.steering.expect_step(["one layer"])
    assert kind(*server.choose(1, drafting)) == VANILLA
    server.steering.in_graphs = False
    assert kind(*server.choose(1, drafting)) == PIECES
