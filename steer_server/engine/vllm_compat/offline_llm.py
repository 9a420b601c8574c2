"""Seam: vLLM's own offline class, with streaming, which it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from steer_server.engine.vllm_compat.engine_core import TAG

Messages = Sequence[Any]


class OfflineLLM:
    """vLLM's `LLM` with the steering of each prompt beside its sampling parameters.

    The plugin must load, which the environment decides as for a server. Raises what `LLM` raises; a spec that cannot
    be carried out is a ValueError whose message starts with the path of the field.
    """

    def __init__(self, model: str, steering: dict[str, Any], settings: dict[str, Any]) -> None:
        """steering: options as in `additional_config["steering"]`. settings: what else `LLM` takes."""
        from vllm import LLM

        additional = dict(settings.pop("additional_config", {}))
        additional[TAG] = {**additional.get(TAG, {}), **steering}
        self.llm = LLM(model, additional_config=additional, **settings)
        self._streams = 0

    def params(self, settings: dict[str, Any], spec: dict[str, Any] | None) -> Any:
        """vLLM's SamplingParams, on the model's own defaults."""
        from vllm import SamplingParams

        params = SamplingParams(**{**self.llm.model_config.get_diff_sampling_param(), **settings})
        if spec is not None:
            params.extra_args = {**(params.extra_args or {}), TAG: spec}
        return params

    def generate(self, prompts: list[Any], params: list[Any], progress: bool) -> list[Any]:
        """vLLM's RequestOutput of each prompt, with `steering` where it was steered."""
        self._refuse_while_streaming()
        return list(self.llm.generate(prompts, params, use_tqdm=progress))

    def chat(self, conversations: Sequence[Messages], params: list[Any], progress: bool, **template: Any) -> list[Any]:
        self._refuse_while_streaming()
        return list(self.llm.chat([list(c) for c in conversations], params, use_tqdm=progress, **template))

    def stream(self, prompt: Any, params: Any, is_chat: bool, **template: Any) -> Iterator[Any]:
        """RequestOutputs that hold what is new since the one before; the last is `finished` and carries the receipt."""
        from vllm.sampling_params import RequestOutputKind

        self._refuse_while_streaming()
        engine = self.llm.llm_engine
        if is_chat:
            rendered = self.llm._preprocess_chat_one(list(prompt), **template)
        else:
            rendered = self.llm._preprocess_cmpl_one(prompt)
        params.output_kind = RequestOutputKind.DELTA
        identifier = engine.add_request(str(next(self.llm.request_counter)), rendered, params)
        self._streams += 1
        finished = False
        try:
            while not finished and engine.has_unfinished_requests():
                for output in engine.step():
                    finished = output.finished
                    yield output
        finally:
            self._streams -= 1
            if not finished:
                engine.abort_request([identifier], internal=True)
                # The engine learns of it in its next step.
                while engine.has_unfinished_requests():
                    engine.step()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _refuse_while_streaming(self) -> None:
        if self._streams:
            raise RuntimeError("a stream is open; read it to its end or close() it first")
