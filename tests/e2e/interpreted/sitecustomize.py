"""Python runs this at the start of every process whose path has this folder: vLLM's Triton kernels then run on CPUs.

vLLM's V2 runner prepares its inputs and samples with Triton kernels. Triton's interpreter runs them without a GPU; vLLM
uses Triton on a CPU where there is a backend of that name, of which it asks no more than whether it is active.
"""

import os
from types import SimpleNamespace

from wrapt.importer import register_post_import_hook

os.environ["TRITON_INTERPRET"] = "1"


def _add_cpu_backend(backends):
    backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True))


register_post_import_hook(_add_cpu_backend, "triton.backends")
