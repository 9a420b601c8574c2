"""Python runs this at the start of every process whose path has this folder: vLLM runs there as it does on a GPU.

vLLM's V2 runner prepares its inputs and samples with Triton kernels. Triton's interpreter runs them without a GPU; vLLM
uses Triton on a CPU where there is a backend of that name. And it schedules asynchronously, which it leaves out on a
CPU as not worth it there.
"""

import os
from types import SimpleNamespace

from wrapt.importer import register_post_import_hook

os.environ["TRITON_INTERPRET"] = "1"


def _add_cpu_backend(backends):
    backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: False))


def _keep_asynchronous_scheduling(platform):
    def check_and_update_config(cls, vllm_config):
        chosen = vllm_config.scheduler_config.async_scheduling
        checked.__func__(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = chosen

    checked = platform.CpuPlatform.check_and_update_config
    platform.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _take_masks_of_any_integer(interpreter):
    """Compiled, what `&` makes of scalar conditions is a mask too; the interpreter calls it an integer."""
    load = interpreter.InterpreterBuilder.create_masked_load

    def create_masked_load(self, pointers, mask, *others):
        mask.data = mask.data.astype(bool)
        return load(self, pointers, mask, *others)

    interpreter.InterpreterBuilder.create_masked_load = create_masked_load


register_post_import_hook(_take_masks_of_any_integer, "triton.runtime.interpreter")
register_post_import_hook(_add_cpu_backend, "triton.backends")
register_post_import_hook(_keep_asynchronous_scheduling, "vllm.platforms.cpu")
if os.environ.get("EMULATED_CUDA_GRAPHS") == "1":
    import emulated_graphs

    register_post_import_hook(emulated_graphs.give_managers_graphs, "vllm.v1.worker.gpu.cudagraph_utils")
    register_post_import_hook(emulated_graphs.keep_metadata, "vllm.v1.worker.gpu.model_states.default")
    register_post_import_hook(emulated_graphs.capture_at_warm_up, "vllm.v1.worker.cpu_worker")
