"""Entry points that vLLM loads. Imports nothing: vLLM logs and forgets a plugin that fails to import, and a server
whose plugin is gone answers unsteered. What runs inside the functions fails loudly."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer_server.api.endpoint import SteeringEndpoint


def register() -> None:
    """`vllm.general_plugins`: called in every process of vLLM, possibly more than once."""
    from steer_server.api.carriers import admit_request
    from steer_server.api.receipts import attach_receipt
    from steer_server.engine.vllm_compat import (
        cuda_graphs,
        engine_config,
        engine_core,
        frontend,
        openai_serving,
        pipeline,
        runner_v1,
        runner_v2,
        step_reports,
        worker_methods,
    )

    engine_config.install()
    openai_serving.install(admit_request, attach_receipt)
    frontend.install()
    engine_core.install()
    runner_v1.install()
    runner_v2.install()
    cuda_graphs.install()
    step_reports.install()
    pipeline.install()
    worker_methods.install()


def endpoint_plugin() -> SteeringEndpoint:
    """`vllm.endpoint_plugins`: called in API servers when VLLM_PLUGINS names steer_server."""
    from steer_server.api.endpoint import SteeringEndpoint

    return SteeringEndpoint()
