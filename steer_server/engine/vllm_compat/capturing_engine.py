"""Seam: an engine in this program's own hands, which says what left some of its sites. For measurements."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np
import torch

from sae_models import HookPoint
from steer_server.engine.admission import AdmittedSteering
from steer_server.engine.vllm_compat.engine_core import TAG


@dataclass(frozen=True)
class CapturedRun:
    """One sequence of n tokens through the served model.

    logprobs: [n - 1] float64, of each token after the first given those before it. streams: what left each captured
    site, after its edits, [n, d_model] float32, by the hook point's name.
    """

    logprobs: torch.Tensor
    streams: dict[str, torch.Tensor]


class CapturingEngine:
    """A real engine with the plugin, one sequence at a time and nothing cached, that captures `hook_points`.

    The outputs of their layers are armed; other places only where one of the SAEs is.

    The plugin must load, which the environment decides as for a server (`VLLM_PLUGINS`).

    saes: folder by name. max_edits: edit rows of the largest plan; the row bank holds one such plan.
    """

    def __init__(
        self,
        model: str,
        saes: Mapping[str, str],
        hook_points: Collection[HookPoint],
        max_edits: int,
        context_length: int,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        eager: bool = False,
    ) -> None:
        from vllm import LLM

        points = sorted(set(hook_points))
        self.sites = [str(point) for point in points]
        self.dtype = getattr(torch, dtype)
        layers = sorted({point.layer for point in points})
        steering = {"saes": dict(saes), "layers": layers, "pretrained": False, "max_edits": max_edits}
        self._llm = LLM(
            model,
            dtype=dtype,
            # One token more than a prompt, which is what vLLM insists on generating.
            max_model_len=context_length + 1,
            max_num_seqs=1,
            enable_prefix_caching=False,
            enforce_eager=eager,
            seed=0,
            additional_config={TAG: steering},
        )
        self._llm.collective_rpc("steering_capture", args=(self.sites,))

    def __enter__(self) -> CapturingEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def run(self, tokens: Sequence[int], steering: AdmittedSteering | None = None) -> CapturedRun:
        """Run one sequence. Raises vLLM's form of NotAppliedError where it was not steered as asked."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            extra_args=None if steering is None else {TAG: steering},
        )
        prompt = {"prompt_token_ids": list(tokens)}
        (output,) = self._llm.generate([prompt], params, use_tqdm=False)
        chosen = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        logprobs = torch.tensor([entry[token].logprob for token, entry in chosen], dtype=torch.float64)
        # Every tensor-parallel worker has the whole stream.
        captured = self._llm.collective_rpc("steering_take_captured")[0]
        streams = {
            site: torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(len(tokens), -1).copy())
            for site, data in zip(self.sites, captured, strict=True)
        }
        return CapturedRun(logprobs, streams)
