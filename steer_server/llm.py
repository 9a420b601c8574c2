"""`SteeredLLM`: steer a model from Python, in a script or a notebook, without a server."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypedDict, overload

from steer_server.embedded_model import SERVED_NAME, embedded_model
from steer_server.engine.environment import vllm_environment
from steer_server.engine.vllm_compat.offline_llm import OfflineLLM

Steering = Mapping[str, Any]
"""The `steering` object of a request."""


class Message(TypedDict):
    """One turn of a conversation. content: text, or OpenAI's list of parts."""

    role: str
    content: Any


class TokenPrompt(TypedDict):
    """A prompt as tokens."""

    prompt_token_ids: list[int]


Prompt = str | TokenPrompt


@dataclass(frozen=True)
class Choice:
    """One answer. finish_reason: stop or length. logprobs: as vLLM gives them, where they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: Any = None


@dataclass(frozen=True)
class Answer:
    """What one prompt gave.

    choices: as many as `n`. receipt: what was applied, as the workers counted it, the same object as over HTTP; None
    where the prompt was not steered. prompt_tokens: of the prompt, with its template.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    receipt: dict[str, Any] | None

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """For notebooks: the texts, and under them what was applied."""
        texts = "".join(f"<p style='white-space: pre-wrap'>{html.escape(choice.text)}</p>" for choice in self.choices)
        if self.receipt is None:
            return f"{texts}<small>not steered</small>"
        applied = "".join(f"<li>{html.escape(_line(entry))}</li>" for entry in self.receipt["applied"])
        return f"{texts}<small><ul>{applied}</ul></small>"


def _line(entry: dict[str, Any]) -> str:
    """An entry of a receipt, as people read it."""
    layers = ", ".join(map(str, entry["layers"]))
    if "closed" not in entry:
        return f"{entry['source']}: {entry['op']} on {entry['tokens'] + entry['cached']} tokens at layers {layers}"
    # On which of the cached ones the conditions held was said when they were computed.
    cached = f", {entry['cached']} cached," if entry["cached"] else ""
    closed = f"{entry['closed']} where a condition did not hold"
    return f"{entry['source']}: {entry['op']} on {entry['tokens']} tokens, not on {closed}{cached} at layers {layers}"


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer. The last one has a finish_reason and, of a steered answer, the receipt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    receipt: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.text


class SteeredLLM:
    """A model in this process that each prompt steers in its own way.

        llm = SteeredLLM()
        sea = {"features": [{"sae": "smollm2-135m/l15", "index": 4290, "op": "set", "value": 59}]}
        print(llm.chat("Tell me about your weekend.", steering=sea, temperature=0, max_tokens=32).text)

    A context manager: leaving it, or `close()`, stops the engine. vLLM's own `LLM` takes the same steering, in
    `SamplingParams(extra_args={"steering": ...})`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        saes: Mapping[str, str | os.PathLike[str]] | None = None,
        pretrained_saes: bool = True,
        layers: Sequence[int] | None = None,
        max_edits: int | None = None,
        progress: bool = False,
        **vllm: Any,
    ) -> None:
        """Start the engine.

        model: a Hugging Face id or a folder; None for the embedded SmolLM2-135M-Instruct. saes: folders of SAEs by the
        name that steering uses. pretrained_saes: serve those that ship for this model. layers: decoder layers to arm,
        all by default. max_edits: edit rows that one prompt may use. progress: show vLLM's bar while prompts run.
        vllm: whatever else vLLM's `LLM` takes, such as dtype, max_model_len, enforce_eager.

        Raises EmbeddedModelError, and what vLLM raises.
        """
        os.environ.update(vllm_environment(embedded=model is None))
        if model is None:
            model = embedded_model()
            # As `steer-server serve` has it.
            vllm = {"served_model_name": SERVED_NAME, "max_model_len": 4096, **_precise(), **vllm}
        options: dict[str, Any] = {"pretrained": pretrained_saes}
        if saes:
            options["saes"] = {name: os.fspath(folder) for name, folder in saes.items()}
        if layers is not None:
            options["layers"] = list(layers)
        if max_edits is not None:
            options["max_edits"] = max_edits
        self._progress = progress
        self._engine = OfflineLLM(os.fspath(model), options, vllm)

    @property
    def vllm(self) -> Any:
        """vLLM's own `LLM`, for what is not here."""
        return self._engine.llm

    @overload
    def generate(self, prompts: Prompt, *, steering: Steering | None = None, **sampling: Any) -> Answer: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[TokenPrompt] | list[Prompt],
        *,
        steering: Steering | Sequence[Steering | None] | None = None,
        **sampling: Any,
    ) -> list[Answer]: ...

    def generate(
        self,
        prompts: Prompt | list[str] | list[TokenPrompt] | list[Prompt],
        *,
        steering: Steering | Sequence[Steering | None] | None = None,
        **sampling: Any,
    ) -> Answer | list[Answer]:
        """Complete each prompt: an Answer for one, a list of them for a list.

        steering: for all prompts, or one for each. sampling: fields of vLLM's SamplingParams, such as temperature,
        max_tokens, n, seed. Raises ValueError, with the path of the field, where a spec cannot be carried out.
        """
        many = isinstance(prompts, list)
        listed: list[Any] = list(prompts) if many else [prompts]
        params = self._params(sampling, steering, len(listed))
        answers = [_answer(output) for output in self._engine.generate(listed, params, self._progress)]
        return answers if many else answers[0]

    @overload
    def chat(
        self,
        messages: str | list[Message],
        *,
        steering: Steering | None = None,
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Answer: ...

    @overload
    def chat(
        self,
        messages: list[str] | list[list[Message]],
        *,
        steering: Steering | Sequence[Steering | None] | None = None,
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> list[Answer]: ...

    def chat(
        self,
        messages: str | list[Message] | list[str] | list[list[Message]],
        *,
        steering: Steering | Sequence[Steering | None] | None = None,
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Answer | list[Answer]:
        """Answer a conversation, or each of a list of them: an Answer, or a list of them.

        messages: a text is one turn of the user's. template: variables of the model's chat template. The rest as in
        `generate`.
        """
        many = isinstance(messages, list) and not (messages and isinstance(messages[0], Mapping))
        conversations = [_conversation(m) for m in messages] if many else [_conversation(messages)]
        params = self._params(sampling, steering, len(conversations))
        outputs = self._engine.chat(conversations, params, self._progress, **_template(template))
        answers = [_answer(output) for output in outputs]
        return answers if many else answers[0]

    def stream(
        self,
        prompt: Prompt | list[Message],
        *,
        chat: bool = True,
        steering: Steering | None = None,
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """One answer, piece by piece, as the model makes it.

        prompt: a conversation or, as text, one turn of the user's; with chat=False a text or tokens to complete.
        Closing the iterator stops the answer; nothing else runs while it is open.
        """
        (params,) = self._params(sampling, steering, 1)
        if params.n != 1:
            raise ValueError(f"n must be 1 in a stream, got {params.n}")
        given: Any = _conversation(prompt) if chat else prompt
        return self._stream(given, params, chat, _template(template) if chat else {})

    def _stream(self, prompt: Any, params: Any, chat: bool, template: dict[str, Any]) -> Iterator[Chunk]:
        for output in self._engine.stream(prompt, params, chat, **template):
            (piece,) = output.outputs
            receipt = getattr(output, "steering", None)
            yield Chunk(piece.text, tuple(piece.token_ids), piece.finish_reason, receipt)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def __enter__(self) -> SteeredLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _params(
        self, sampling: dict[str, Any], steering: Steering | Sequence[Steering | None] | None, count: int
    ) -> list[Any]:
        if steering is None or isinstance(steering, Mapping):
            specs: list[Steering | None] = [steering] * count
        else:
            specs = list(steering)
        if len(specs) != count:
            raise ValueError(f"steering has {len(specs)} entries for {count} prompts")
        return [self._engine.params(sampling, None if spec is None else dict(spec)) for spec in specs]


def _precise() -> dict[str, str]:
    """bfloat16 is slow on processors without support for it."""
    import torch

    return {} if torch.cuda.is_available() else {"dtype": "float32"}


def _conversation(messages: Any) -> list[Any]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)


def _template(given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if given is None else {"chat_template_kwargs": dict(given)}


def _answer(output: Any) -> Answer:
    choices = tuple(
        Choice(choice.text, tuple(choice.token_ids), choice.finish_reason, choice.logprobs) for choice in output.outputs
    )
    return Answer(choices, len(output.prompt_token_ids), getattr(output, "steering", None))
