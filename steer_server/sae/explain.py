"""Run a Hugging Face model over text and collect evidence of what each feature of an SAE means."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sae_models import SAE
from sae_models.features.evidence import (
    SINK_NORM,
    SPAN_LENGTHS,
    SPAN_SHARE,
    WINDOW_AFTER,
    WINDOW_BEFORE,
    Ints,
    Peak,
    Tally,
    automatic_label,
    folded_unembedding,
    four_digits,
    informative,
    vocabulary_projection,
)
from sae_models.features.feature import Context, Evidence, Feature, TokenScore
from sae_models.token_norm import token_scales
from steer_server.sae.hugging_face import LayoutError, decoder_layers, final_norm, watch

Progress = Callable[[str, int, int], None]
"""Called with a stage of the work, how much of it is done, and how much there is."""

TOP_TOKENS = 10
# Batches that the median norm is taken from, before anything is counted.
CALIBRATION_BATCHES = 4
PROJECTED_AT_ONCE = 64
# What model makers call the places of their vocabulary that training never saw.
UNUSED = re.compile(r"[<\[].*(unused|reserved).*[>\]]", re.IGNORECASE)


class ExplainError(ValueError):
    """Evidence that cannot be had of this SAE, this model or this text."""


@dataclass(frozen=True)
class _Model:
    """What is used of a language model.

    decoder: all but its head, cut after `layer`, the SAE's. unembedding: [vocabulary, d_in]. prefix: ids that its
    tokenizer puts before every text. max_positions: of a sequence, where there is a limit.
    """

    decoder: nn.Module
    layer: nn.Module
    final_norm: nn.Module
    unembedding: torch.Tensor
    tokenizer: Any
    prefix: tuple[int, ...]
    max_positions: int | None
    device: torch.device


@dataclass(frozen=True)
class _Chunk:
    """A piece of one text. ids: [tokens]. bounds: [tokens + 1], where in `text` each token starts and the last ends."""

    ids: Ints
    text: str
    bounds: Ints

    def pieces(self, start: int, stop: int) -> tuple[str, ...]:
        """The text of tokens [start, stop), which joined are the text there: a character that several tokens share is
        the first one's."""
        return tuple(self.text[a:b] for a, b in pairwise(self.bounds[start : stop + 1]))


def explain(
    sae: SAE,
    model_path: str | Path,
    texts: Sequence[str],
    sources: Sequence[str],
    *,
    tokens: int = 400_000,
    contexts: int = 10,
    spans: int = 2,
    context_length: int = 256,
    batch: int = 8,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Evidence, Iterator[Feature]]:
    """Evidence of all features of `sae` from `texts`, features ascending; they are made while they are iterated over.

    model_path: a folder or hub id in Hugging Face format, run in fp32 on the GPU where there is one. sources: what the
    texts are, with licences. tokens: how many to read at most; of more text, pieces are taken at random, always the
    same ones. contexts: strongest contexts for each feature. spans: for how many of them a minimal span is looked for.
    context_length: tokens of a sequence, at most. batch: sequences that run at once. Raises ExplainError.
    """
    model = _open_model(model_path, sae)
    # A prefix is not text: it is left out even by an SAE that skips nothing.
    skip = max(0, sae.skip_first - len(model.prefix))
    chunks = _chunks(texts, model, skip, context_length, tokens)
    if not chunks:
        raise ExplainError(f"no usable tokens in {len(texts)} texts: SAE {sae.name!r} skips {sae.skip_first} of each")
    decoder = sae.decoder()
    reader = _Reader(model, sae)
    tally, mean_norm, sink_norm = _tally(reader, chunks, skip, contexts, batch, progress)
    lengths = _span_lengths(reader, tally, chunks, spans, sink_norm, batch * context_length, progress)
    evidence = Evidence(
        sae_name=sae.name,
        sae_sha256=sae.sha256,
        model_name=sae.model_name or Path(model_path).name,
        layer=sae.hook_point.layer,
        d_sae=sae.d_sae,
        tokens=tally.tokens,
        mean_residual_norm=mean_norm,
        sources=tuple(sources),
    )
    return evidence, _features(tally, chunks, lengths, decoder, model, progress)


def _open_model(path: str | Path, sae: SAE) -> _Model:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a folder can be wrong in any way, and transformers has no error of its own
        raise ExplainError(f"{path}: not a model that transformers can load: {error}") from error
    if not tokenizer.is_fast:
        raise ExplainError(f"{path}: its tokenizer does not say where in the text its tokens are (not a fast one)")
    config = model.config.get_text_config()
    if {sae.d_in, sae.d_out} != {config.hidden_size}:
        raise ExplainError(f"SAE {sae.name!r} is for d_model={sae.d_in}, the model has {config.hidden_size}")
    n_layers = config.num_hidden_layers
    if sae.hook_point.layer >= n_layers:
        raise ExplainError(f"SAE {sae.name!r} is for layer {sae.hook_point.layer}, the model has {n_layers} layers")
    decoder = model.get_decoder()
    try:
        layers = decoder_layers(decoder, n_layers)
        norm = final_norm(decoder, layers, config.hidden_size)
    except LayoutError as error:
        raise ExplainError(str(error)) from None
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != sae.d_out:
        raise ExplainError(f"{type(model).__name__}: found no unembedding of width {sae.d_out}")
    # Later layers would be computed for nothing.
    del layers[sae.hook_point.layer + 1 :]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _Model(
        decoder=decoder.to(device).eval(),
        layer=layers[sae.hook_point.layer],
        final_norm=norm.to(device),
        unembedding=head.weight.detach().to(device),
        tokenizer=tokenizer,
        prefix=tuple(tokenizer("").input_ids),
        max_positions=getattr(config, "max_position_embeddings", None),
        device=device,
    )


def _chunks(texts: Sequence[str], model: _Model, skip: int, context_length: int, tokens: int) -> list[_Chunk]:
    """Pieces of the texts, each of more than `skip` tokens and with the prefix of at most `context_length`; `tokens` of
    them at most."""
    length = min(context_length, model.max_positions or context_length) - len(model.prefix)
    if length < 1:
        raise ExplainError(f"context_length={context_length} has no room for text; the prefix is {model.prefix}")
    found = []
    for text in texts:
        encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        bounds = np.maximum.accumulate(np.concatenate(([0], ends)))
        for start in range(0, len(ids), length):
            stop = min(start + length, len(ids))
            if stop - start > skip:
                found.append(_Chunk(ids[start:stop], text, bounds[start : stop + 1]))
    random.Random(0).shuffle(found)
    together = np.cumsum([len(chunk.ids) for chunk in found])
    return found[: int(np.searchsorted(together, tokens, side="right"))]


class _Reader:
    """The stream where the SAE reads, and the SAE's activations of it."""

    def __init__(self, model: _Model, sae: SAE) -> None:
        self.model, self.sae = model, sae
        self._W_enc, self._b_enc = (tensor.to(model.device) for tensor in sae.encoder())
        self._stream = torch.empty(0)
        try:
            watch(model.layer, sae.hook_point, self._remember)
        except LayoutError as error:
            raise ExplainError(f"SAE {sae.name!r}: {error}") from None

    def _remember(self, stream: torch.Tensor) -> None:
        self._stream = stream

    @torch.inference_mode()
    def residual(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, length, d_in] of ids [n, length]. What follows a token does not change it, so padding needs no mask."""
        self.model.decoder(input_ids=ids.to(self.model.device), use_cache=False)
        return self._stream

    def chunks(self, chunks: Sequence[_Chunk], batch: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(index, residual stream [tokens, d_in] without the prefix) of every chunk, in an order that leaves little
        padding and does not begin with the shortest."""
        order = sorted(range(len(chunks)), key=lambda index: len(chunks[index].ids))
        batches = [order[i : i + batch] for i in range(0, len(order), batch)]
        random.Random(0).shuffle(batches)
        prefix = self.model.prefix
        for members in batches:
            longest = max(len(chunks[index].ids) for index in members)
            ids = torch.zeros(len(members), len(prefix) + longest, dtype=torch.long)
            ids[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.long)
            for row, index in enumerate(members):
                ids[row, len(prefix) : len(prefix) + len(chunks[index].ids)] = torch.from_numpy(chunks[index].ids)
            stream = self.residual(ids)
            for row, index in enumerate(members):
                yield index, stream[row, len(prefix) : len(prefix) + len(chunks[index].ids)]

    @torch.inference_mode()
    def activations(self, residual: torch.Tensor) -> torch.Tensor:
        """[n, d_sae] of residual [n, d_in], on the CPU."""
        a, _ = token_scales(residual, self.sae.token_norm)
        return self.sae.activate(torch.addmm(self._b_enc, a * residual, self._W_enc), residual).cpu()


@torch.inference_mode()
def _tally(
    reader: _Reader, chunks: Sequence[_Chunk], skip: int, contexts: int, batch: int, progress: Progress
) -> tuple[Tally, float, float]:
    """(what was counted, mean norm of the residual stream, norm above which a token is an attention sink)."""
    tally = Tally(reader.sae.d_sae, len(reader.model.unembedding), contexts)
    stream = reader.chunks(chunks, batch)
    first = list(islice(stream, CALIBRATION_BATCHES * batch))
    sink_norm = SINK_NORM * float(torch.cat([residual[skip:].norm(dim=-1) for _, residual in first]).median())
    norm_sum, done, total = 0.0, 0, sum(len(chunk.ids) for chunk in chunks)
    for index, residual in chain(first, stream):
        norms = residual.norm(dim=-1).cpu()
        used = norms <= sink_norm
        used[:skip] = False
        acts = reader.activations(residual)
        acts[~used] = 0.0
        tally.add(index, chunks[index].ids, used.numpy(), acts)
        norm_sum += float(norms[used].double().sum())
        done += len(residual)
        progress("reading", done, total)
    return tally, norm_sum / tally.tokens, sink_norm


@torch.inference_mode()
def _span_lengths(
    reader: _Reader,
    tally: Tally,
    chunks: Sequence[_Chunk],
    spans: int,
    sink_norm: float,
    tokens_at_once: int,
    progress: Progress,
) -> Ints:
    """[d_sae, spans]: tokens of the minimal span of each feature's strongest contexts; 0 where there is none.

    A span runs behind a token of its own, as the first one of a sequence is a sink that the SAE was not trained on.
    """
    lengths = np.zeros((tally.d_sae, spans), dtype=np.int64)
    found = [(f, rank, peak) for f in range(tally.d_sae) for rank, peak in enumerate(tally.strongest.of(f)[:spans])]
    tokenizer, skip = reader.model.tokenizer, reader.sae.skip_first
    lead_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    lead = [] if lead_id is None else [lead_id] * max(1, skip)
    for length in SPAN_LENGTHS:
        todo = [
            (feature, rank, peak)
            for feature, rank, peak in found
            # Only what is shorter than the text that was there.
            if lengths[feature, rank] == 0 and length <= peak.position and len(lead) + length > skip
        ]
        if not todo:
            continue
        ids = np.stack([chunks[p.chunk].ids[p.position - length + 1 : p.position + 1] for _, _, p in todo])
        # Many features peak on the same few words.
        distinct, inverse = np.unique(ids, axis=0, return_inverse=True)
        members = np.argsort(inverse.reshape(-1), kind="stable")
        first = np.searchsorted(inverse.reshape(-1)[members], np.arange(len(distinct) + 1))
        rows = max(1, tokens_at_once // (len(lead) + length))
        for start in range(0, len(distinct), rows):
            alone = torch.from_numpy(distinct[start : start + rows])
            behind = torch.tensor(lead, dtype=torch.long).expand(len(alone), -1)
            residual = reader.residual(torch.cat([behind, alone], dim=1))[:, -1]
            acts = reader.activations(residual).numpy()
            acts[(residual.norm(dim=-1) > sink_norm).cpu().numpy()] = 0.0
            for row in range(len(alone)):
                for member in members[first[start + row] : first[start + row + 1]]:
                    feature, rank, peak = todo[member]
                    if acts[row, feature] >= SPAN_SHARE * peak.value:
                        lengths[feature, rank] = length
            progress(f"spans of {length}", min(start + rows, len(distinct)), len(distinct))
    return lengths


def _context(peak: Peak, chunk: _Chunk, span: int) -> Context:
    """span: its length in tokens, 0 for none."""
    start = max(0, peak.position - max(WINDOW_BEFORE, span - 1))
    stop = min(len(chunk.ids), peak.position + WINDOW_AFTER + 1)
    place = peak.position - start
    return Context(
        tokens=chunk.pieces(start, stop),
        activations=peak.around(start, stop),
        peak=place,
        span=(place + 1 - span, place + 1) if span else None,
    )


def _vocabulary(model: _Model) -> tuple[list[str], NDArray[np.bool_], NDArray[np.bool_]]:
    """(each token as text, which are text by themselves, which of those are ordinary: neither special nor unused)."""
    tokenizer, size = model.tokenizer, len(model.unembedding)
    # Behind another token: some tokenizers drop the space that a text begins with.
    anchor = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    before = len(tokenizer.decode(anchor))
    known = min(size, len(tokenizer))
    texts = [tokenizer.decode([*anchor, i], clean_up_tokenization_spaces=False)[before:] for i in range(known)]
    texts += [""] * (size - known)
    # A part of a character decodes to the replacement character.
    named = np.array([text != "" and "\ufffd" not in text for text in texts])
    ordinary = named & np.array([UNUSED.fullmatch(text) is None for text in texts])
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ordinary[[i for i in special | set(tokenizer.all_special_ids) if i < size]] = False
    return texts, named, ordinary


def _norm_gain(norm: nn.Module, d_in: int, device: torch.device) -> torch.Tensor:
    """[d_in]: what a final norm multiplies with. Measured, as some families store the gain and some the gain less 1.

    On a vector of alternating signs, whose mean is 0 and whose mean square is 1, LayerNorm and RMSNorm only multiply
    and shift.
    """
    signs = torch.ones(d_in, device=device)
    signs[1::2] = -1.0
    return (norm(signs) - norm(-signs)) / 2 * signs


@torch.inference_mode()
def _features(
    tally: Tally, chunks: Sequence[_Chunk], spans: Ints, decoder: torch.Tensor, model: _Model, progress: Progress
) -> Iterator[Feature]:
    """spans: of `_span_lengths`. decoder: float32 [d_sae, d_in]."""
    texts, named, ordinary = _vocabulary(model)
    informed = informative(tally, named, TOP_TOKENS)
    kept = np.flatnonzero(ordinary)
    unembedding = folded_unembedding(
        model.unembedding[torch.from_numpy(kept)],
        _norm_gain(model.final_norm, decoder.shape[1], model.device),
        isinstance(model.final_norm, nn.LayerNorm),
    )

    def scores(ids: Ints, values: NDArray[Any]) -> tuple[TokenScore, ...]:
        return tuple(TokenScore(texts[i], four_digits(value)) for i, value in zip(ids, values, strict=True))

    for start in range(0, tally.d_sae, PROJECTED_AT_ONCE):
        block = decoder[start : start + PROJECTED_AT_ONCE].to(model.device)
        raised, lowered = vocabulary_projection(block, unembedding, TOP_TOKENS)
        for row, norm in enumerate(block.norm(dim=1).tolist()):
            index = start + row
            maximum = float(tally.maximum[index])
            said = slice(informed.starts[index], informed.starts[index + 1])
            ranked = tally.strongest.of(index)
            lengths = [*spans[index].tolist(), *[0] * len(ranked)]
            feature = Feature(
                index=index,
                density=int(tally.active[index]) / tally.tokens,
                max_activation=maximum,
                decoder_norm=norm,
                quantiles=tuple(min(value, maximum) for value in tally.histogram.quantiles(index)),
                raised=scores(kept[raised.tokens[row]], raised.logits[row]),
                lowered=scores(kept[lowered.tokens[row]], lowered.logits[row]),
                informative=scores(informed.tokens[said], informed.bits[said]),
                contexts=tuple(
                    _context(peak, chunks[peak.chunk], length) for peak, length in zip(ranked, lengths, strict=False)
                ),
            )
            yield replace(feature, label=automatic_label(feature))
        progress("describing", min(start + PROJECTED_AT_ONCE, tally.d_sae), tally.d_sae)
