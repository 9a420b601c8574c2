"""Fidelity of an SAE as it is served, beside an independent way to the same numbers.

Served: vLLM with this project's op. The clean, spliced and zeroed runs are three requests; the streams are what the
armed layers passed on, the activations come from the kernel that steers with them, and cross-entropies from vLLM's own
log-probabilities of the prompt. KL needs whole distributions, which those are not: the stream after the last decoder
layer is captured, and the final norm and the unembedding are applied to it in fp32 with the Hugging Face model.
Reference: `steer_server.sae.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from sae_models import SAE, HookPoint
from steer_kernels.apply_edits import SiteEdits, TopKEncoder, read_activations
from steer_server.engine.admission import AdmittedSteering
from steer_server.engine.encoders import encoder_of
from steer_server.engine.vllm_compat.capturing_engine import CapturingEngine
from steer_server.sae.fidelity import EvalError, FidelityReport, FidelitySums, Observation, jaccard, kl_divergence
from steer_server.sae.reference import ReferenceModel, ReferenceSAE, reference_sae
from steer_server.sae.splice import edits_of_splice, reconstruction, zero_ablation

MIN_SEQUENCE = 32
"""Shorter pieces of text are left out: their tokens have too little to attend to."""


def evaluate(
    sae: SAE,
    model: str | Path,
    texts: Sequence[str],
    *,
    tokens: int = 20_000,
    context_length: int = 256,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    eager: bool = False,
) -> FidelityReport:
    """Run at most `tokens` tokens of `texts`, in sequences of at most `context_length`, both ways.

    dtype, eager: of the served model. The bounds on agreement are for float32; another dtype's rounding may exceed
    them. The reference runs on the CPU. The environment must let vLLM load the plugin, as for a server.

    Raises EvalError where the texts are too short or the SAE does not fit the model.
    """
    from transformers import AutoTokenizer

    check_fit(sae, str(model), context_length)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    sequences = token_sequences(texts, tokenizer, tokens, context_length, sae.skip_first)
    network = ReferenceModel(str(model))
    with serving([sae], model, network.last_layer, context_length, dtype, eager) as engine:
        return compare(engine, network, sae, reference_sae(sae), sequences, str(model))


def serving(
    saes: Sequence[SAE],
    model: str | Path,
    last_layer: int,
    context_length: int,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    eager: bool = False,
) -> CapturingEngine:
    """An engine on which any of `saes` can be evaluated."""
    return CapturingEngine(
        str(model),
        saes={f"sae{i}": str(sae.folder) for i, sae in enumerate(saes)},
        hook_points={sae.hook_point for sae in saes} | {HookPoint(last_layer)},
        max_edits=max(edits_of_splice(sae) for sae in saes),
        context_length=context_length,
        dtype=dtype,
        eager=eager,
    )


def compare(
    engine: CapturingEngine,
    network: ReferenceModel,
    sae: SAE,
    reference: ReferenceSAE,
    sequences: Sequence[Sequence[int]],
    model: str,
) -> FidelityReport:
    """Evaluate `sae` served and `reference` by Hugging Face, on the same sequences of token ids."""
    served_sums, reference_sums = (FidelitySums(sae.d_in, sae.d_sae) for _ in range(2))
    served_path = _ServedPath.of(sae, engine)
    similarity = compared = 0.0
    for ids in track(sequences, "sequences", console=Console(stderr=True)):
        served = served_path.observe(engine, network, ids)
        independent = network.observe(ids, sae.hook_point.layer, reference, sae.skip_first)
        served_sums.add(served, sae.skip_first)
        reference_sums.add(independent, sae.skip_first)
        both = served.measured(sae.skip_first) & independent.measured(sae.skip_first)
        similarity += float(jaccard(served.active[both], independent.active[both]).sum())
        compared += int(both.sum())
    return FidelityReport(
        sae=sae.name,
        model=model,
        hook_point=str(sae.hook_point),
        sequences=len(sequences),
        served=served_sums.fidelity(),
        reference=reference_sums.fidelity(),
        jaccard=similarity / compared,
    )


def check_fit(sae: SAE, model: str, context_length: int) -> None:
    """Raise EvalError where the SAE is not for a model of this shape, or the model has no such context."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    if sae.d_in != config.hidden_size:
        raise EvalError(f"SAE {sae.name!r} is for d_model={sae.d_in}, {model} has {config.hidden_size}")
    if sae.hook_points != sae.hook_points_out or len(sae.hook_points) > 1 or sae.hook_point.kind != "resid_post":
        raise EvalError(f"SAE {sae.name!r} is at {sae.hook_point}; what is measured are SAEs on one layer's resid_post")
    if sae.token_norm != "none":
        raise EvalError(f"SAE {sae.name!r} normalises each token ({sae.token_norm}), which is not measured")
    if sae.hook_point.layer >= config.num_hidden_layers:
        raise EvalError(
            f"SAE {sae.name!r} is for {sae.hook_point}, {model} has layers 0 to {config.num_hidden_layers - 1}"
        )
    # vLLM generates one token after each sequence.
    longest = config.max_position_embeddings - 1
    if not MIN_SEQUENCE <= context_length <= longest:
        raise EvalError(f"context length {context_length}: {model} allows {MIN_SEQUENCE} to {longest}")


def token_sequences(
    texts: Sequence[str], tokenizer: Any, tokens: int, context_length: int, skip_first: int
) -> list[list[int]]:
    """Consecutive pieces of each text, as sequences that start as the tokenizer starts a text.

    tokens: at most so many, all together. Raises EvalError where no piece is long enough.
    """
    shortest = max(MIN_SEQUENCE, skip_first + 2)
    start = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
    sequences: list[list[int]] = []
    left = tokens
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        step = context_length - len(start)
        for first in range(0, len(ids), step):
            piece = [*start, *ids[first : first + step]][:left]
            if len(piece) >= shortest:
                sequences.append(piece)
                left -= len(piece)
        if left < shortest:
            break
    if not sequences:
        raise EvalError(
            f"nothing to evaluate on: no text has {shortest} tokens, or fewer than that were asked for ({tokens})"
        )
    return sequences


@dataclass(frozen=True)
class _ServedPath:
    """An SAE's plans, and its features as one table of reading edits over the encoder rows in `rows`."""

    sae: SAE
    reconstruction: AdmittedSteering
    zero: AdmittedSteering
    features: SiteEdits
    rows: torch.Tensor
    encoders: tuple[TopKEncoder, ...]

    @staticmethod
    def of(sae: SAE, engine: CapturingEngine) -> _ServedPath:
        features = [sae.rows(i) for i in range(sae.d_sae)]
        index, ones = np.arange(sae.d_sae), np.ones(sae.d_sae, dtype=np.float32)
        return _ServedPath(
            sae=sae,
            reconstruction=AdmittedSteering(reconstruction(sae), None),
            zero=AdmittedSteering(zero_ablation(sae), None),
            features=SiteEdits(
                start=np.zeros_like(index),
                stop=np.zeros_like(index),
                read=index,
                write=index,
                bias=np.array([row.bias for row in features], dtype=np.float32),
                threshold=np.array([row.threshold for row in features], dtype=np.float32),
                scale=ones,
                shift=0 * ones,
                low=-np.inf * ones,
                high=np.inf * ones,
                encoder=np.full(sae.d_sae, -1 if sae.selection is None else 0),
                feature=index,
                norm=np.zeros_like(index),
                source=np.full(sae.d_sae, -1),
                preserve_norm=np.zeros(sae.d_sae, dtype=np.bool_),
                gate=np.full(sae.d_sae, -1),
            ),
            # As the row bank holds them.
            rows=torch.stack([row.encoder for row in features]).to(engine.dtype),
            encoders=() if sae.selection is None else (encoder_of(sae, torch.device("cpu")),),
        )

    def observe(self, engine: CapturingEngine, network: ReferenceModel, ids: Sequence[int]) -> Observation:
        site, last = str(self.sae.hook_point), str(HookPoint(network.last_layer))
        clean, spliced, zeroed = engine.run(ids), engine.run(ids, self.reconstruction), engine.run(ids, self.zero)
        x = clean.streams[site]
        logprobs = network.logits(clean.streams[last]).log_softmax(-1)
        return Observation(
            x=x,
            xhat=spliced.streams[site],
            active=read_activations(x, self.features, self.rows, self.encoders) > 0,
            loss_clean=-clean.logprobs,
            loss_sae=-spliced.logprobs,
            loss_zero=-zeroed.logprobs,
            kl_sae=kl_divergence(logprobs, network.logits(spliced.streams[last]).log_softmax(-1)),
            kl_zero=kl_divergence(logprobs, network.logits(zeroed.streams[last]).log_softmax(-1)),
        )
