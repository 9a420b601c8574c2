"""What steering cannot do exactly yet is refused when the server starts, with what to change."""

from __future__ import annotations

import os
from typing import Any

from steer_server.engine.config import ConfigError, ModelFacts

DRAFTING = ("ngram", "draft_model", "eagle")
"""Methods of speculative decoding under which answers and receipts were compared with those without it.

Whatever drafts, the steered model decides: it computes each drafted token with its edits and keeps those that it would
have sampled. The drafting model is neither armed nor steered.
"""


def is_steerable(vllm_config: Any) -> bool:
    """Whether this engine generates text at all; pooling models have nothing to steer."""
    model = vllm_config.model_config
    return model is not None and model.runner_type == "generate"


def refuse_unsupported(vllm_config: Any) -> None:
    """Raise ConfigError where this engine's configuration would make steering inexact."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative, staged = vllm_config.speculative_config, parallel.pipeline_parallel_size > 1
    refusals = [
        (os.environ.get("VLLM_USE_RUST_FRONTEND") == "1", "the Rust front end. Unset VLLM_USE_RUST_FRONTEND"),
        (
            speculative is not None and speculative.method not in DRAFTING,
            "this kind of speculative decoding, which was not tested. Leave out --speculative-config, or set its "
            f"method to {' or '.join(DRAFTING)}",
        ),
        (
            speculative is not None
            and vllm_config.scheduler_config.async_scheduling
            and not vllm_config.use_v2_model_runner,
            # There the worker takes all drafts for accepted until the forward behind them has begun.
            "speculative decoding under asynchronous scheduling on the V1 model runner. Add --no-async-scheduling",
        ),
        (
            speculative is not None and speculative.enable_adaptive_verification,
            # There the device chooses how many drafts of a request a forward computes, and so where all tokens lie.
            "adaptive verification of drafts. Set enable_adaptive_verification to false in --speculative-config",
        ),
        (
            staged and parallel.distributed_executor_backend != "mp",
            "pipeline parallelism over anything but vLLM's own processes. Use --distributed-executor-backend mp",
        ),
        (
            staged and speculative is not None,
            "pipeline parallelism together with speculative decoding. Leave out --speculative-config",
        ),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "prefill context parallelism"),
        (getattr(parallel, "use_ubatching", False), "dual-batch overlap. Leave out --enable-dbo"),
        (vllm_config.kv_transfer_config is not None, "KV connectors. Leave out --kv-transfer-config"),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "KV-sharing fast prefill. Leave out --kv-sharing-fast-prefill",
        ),
        (model.enable_sleep_mode, "sleep mode. Leave out --enable-sleep-mode"),
        (model.is_encoder_decoder, "encoder-decoder models"),
        (getattr(model, "is_diffusion", False), "diffusion language models"),
        (
            getattr(vllm_config.compilation_config.pass_config, "enable_sp", False),
            "sequence parallelism. Set enable_sp to false in --compilation-config",
        ),
        (
            _graphs_without_compilation(vllm_config.compilation_config),
            "CUDA graphs of a model that vLLM does not compile. Set VLLM_USE_BREAKABLE_CUDAGRAPH=0 or cudagraph_mode "
            "to NONE in --compilation-config",
        ),
    ]
    for present, what in refusals:
        if present:
            raise ConfigError(
                f"Steer Server {'cannot steer with' if '.' not in what else 'does not support'} {what}. "
                "To serve without steering, take steer_server out of VLLM_PLUGINS."
            )


def _graphs_without_compilation(compilation: Any) -> bool:
    """Whether CUDA graphs are captured that `split_at_the_op` cannot split at our op."""
    from vllm.config import CompilationMode, CUDAGraphMode

    return compilation.mode != CompilationMode.VLLM_COMPILE and compilation.cudagraph_mode != CUDAGraphMode.NONE


def model_facts(vllm_config: Any) -> ModelFacts:
    model = vllm_config.model_config
    return ModelFacts(
        name=model.model,
        d_model=model.get_hidden_size(),
        n_layers=model.hf_text_config.num_hidden_layers,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        frontends=vllm_config.parallel_config._api_process_count,
        stages=vllm_config.parallel_config.pipeline_parallel_size,
    )
