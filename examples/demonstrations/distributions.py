"""Whole next-token distributions as served, steered or not, and the distances between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from vllm import LLM, SamplingParams


@dataclass(frozen=True)
class Answer:
    """text, token ids, and [tokens, vocab] log-probabilities that each token was chosen from."""

    text: str
    ids: list[int]
    logprobs: np.ndarray


def engine(model: str) -> LLM:
    return LLM(model, dtype="float32", max_model_len=1024, enforce_eager=True, max_logprobs=-1)


def generate(llm: LLM, prompt: list[int], steering: dict | None, tokens: int) -> tuple[Answer, dict | None]:
    """(greedy answer, receipt)."""
    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        logprobs=-1,
        flat_logprobs=True,
        # Else vLLM would decode the whole vocabulary at every step.
        detokenize=False,
        extra_args=None if steering is None else {"steering": steering},
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    text = llm.get_tokenizer().decode(ids, skip_special_tokens=True)
    return Answer(text, ids, dense(completion.logprobs, len(ids))), getattr(output, "steering", None)


def read(llm: LLM, prompt: list[int], answer: list[int]) -> np.ndarray:
    """[tokens, vocab]: log-probabilities that the unsteered model gives at each token of someone's answer."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt + answer}], params, use_tqdm=False)
    return dense(output.prompt_logprobs, len(prompt) + len(answer))[len(prompt) :]


def dense(flat: object, positions: int) -> np.ndarray:
    """[positions, vocab] of vLLM's flat log-probabilities; rows that it has none for are NaN."""
    vocab = max(flat.token_ids) + 1
    rows = np.full((positions, vocab), np.nan, dtype=np.float64)
    for position, (start, end) in enumerate(zip(flat.start_indices, flat.end_indices, strict=True)):
        rows[position, flat.token_ids[start:end]] = flat.logprobs[start:end]
    return rows


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over tokens of KL(p || q) in nats, of log-probabilities."""
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def perplexity(logprobs: np.ndarray, ids: list[int]) -> float:
    return float(np.exp(-logprobs[np.arange(len(ids)), ids].mean()))
