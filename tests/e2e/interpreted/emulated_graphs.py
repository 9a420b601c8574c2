"""CUDA graphs of whole forwards for the V2 runner on a CPU, so that vLLM captures and replays them as on a GPU.

A CUDA graph's Python ran at capture. So what runs again here is the forward of the capture, on the same buffers, with
the sites that were bound then and what their launches depend on as it was then. Attention's metadata, which a GPU's
backends keep in buffers of their own, is brought up to date by hand.

`tests/launch_recorder.py` is stricter about our launches, and knows no attention.
"""

from collections import Counter

SIZES = list(range(1, 33))
"""Every number of tokens has its graph: vLLM's CPU attention takes no padding."""
replays = Counter()
"""By the class of the graph's key."""
_latest = {}


class EmulatedGraph:
    def __init__(self, key, forward, metadata):
        from steer_kernels.apply_edits import op

        self.kind, self.forward, self.metadata = type(key).__name__, forward, metadata
        self.sites = op._bound
        self.launches = self.frozen()

    def frozen(self):
        """What Python decides of the sites' launches."""
        tables = [site.edits._table for site in self.sites]
        return [(table, table.rankings, table.columns, table.longest_group) for table in tables]

    def replay(self):
        from vllm.config import CUDAGraphMode

        from steer_kernels.apply_edits import op

        replays[self.kind] += 1
        for layer, metadata in self.metadata.items():
            vars(metadata).update(vars(_latest["metadata"][layer]))
        bound, launches = op._bound, self.frozen()
        op._bound = self.sites
        thaw(self.launches)
        for site in self.sites:
            site.start_forward()
        try:
            self.forward(CUDAGraphMode.NONE)
        finally:
            op._bound = bound
            thaw(launches)


def thaw(launches):
    for table, rankings, columns, longest_group in launches:
        table.rankings, table.columns, table.longest_group = rankings, columns, longest_group


def give_managers_graphs(module):
    """module: vllm.v1.worker.gpu.cudagraph_utils, before the plugin wraps what is in it."""
    from vllm.config import CUDAGraphMode

    manager = module.ModelCudaGraphManager
    init, prepare = manager.__init__, module.prepare_inputs_to_capture

    def with_graphs(self, vllm_config, device, cudagraph_mode, *args, **kwargs):
        compilation = vllm_config.compilation_config
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, SIZES[-1]
        # There is no pool of graphs, which a manager with a mode asks for at once.
        init(self, vllm_config, device, CUDAGraphMode.NONE, *args, **kwargs)
        self.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        self._init_candidates()

    def prepare_inputs_to_capture(*args, **kwargs):
        _latest["capture"] = prepare(*args, **kwargs)
        return _latest["capture"]

    def capture(self, create_forward_fn, progress_bar_desc=""):
        for key in self._capture_descs[CUDAGraphMode.FULL]:
            forward = create_forward_fn(key, warmup=False)
            metadata = _latest["capture"].attn_metadata
            forward(CUDAGraphMode.NONE)
            self.graphs[key] = EmulatedGraph(key, forward, metadata)
        self._graphs_captured = True

    manager.__init__ = with_graphs
    module.prepare_inputs_to_capture = prepare_inputs_to_capture
    # Pieces run as they are, eager ones too.
    module.has_compiled_submodule = lambda model: True
    module.CudaGraphManager.capture = capture


def keep_metadata(module):
    """module: vllm.v1.worker.gpu.model_states.default."""
    prepare_attn = module.DefaultModelState.prepare_attn

    def kept(self, *args, **kwargs):
        _latest["metadata"] = prepare_attn(self, *args, **kwargs)
        return _latest["metadata"]

    module.DefaultModelState.prepare_attn = kept


def capture_at_warm_up(module):
    """module: vllm.v1.worker.cpu_worker, before the plugin wraps what is in it."""
    warm_up = module.CPUWorker.compile_or_warm_up_model

    def compile_or_warm_up_model(self):
        times = warm_up(self)
        runner = self.model_runner
        runner.cudagraph_manager.capture(
            runner.model,
            runner.model_state,
            runner.input_buffers,
            runner.intermediate_tensors,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
        )
        return times

    module.CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model
