"""The other way to an SAE's numbers: Hugging Face transformers in fp32, and the SAE's own equations.

Nothing of the served path is used here: no edit rows, no kernels; no folding for the common SAELens kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from sae_models import SAE
from sae_models.families import saelens
from steer_server.sae.fidelity import EvalError, Observation, kl_divergence
from steer_server.sae.hugging_face import LayoutError, decoder_layers, final_norm

HEAD_TOLERANCE = 1e-3
"""How far final norm and unembedding, applied here, may be from the model's own logits, relative to the largest."""


class ReferenceSAE(Protocol):
    """Activations and reconstructions in float64, by other code than the kernels'."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """f [tokens, d_sae] of x [tokens, d_in], float64."""
        ...

    def decode(self, f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """xhat [tokens, d_in] of f [tokens, d_sae], float64."""
        ...


def reference_sae(sae: SAE) -> ReferenceSAE:
    """By the equations of the file as written where it is SAELens', of the three kinds that need few; else `sae`."""
    if sae.family == saelens.NAME and sae.architecture in SAELensReference.ARCHITECTURES:
        return SAELensReference(sae.folder)
    return sae


class SAELensReference:
    """A SAELens folder by the definitions of SAELens' `encode` and `decode`, in float64: nothing is folded."""

    ARCHITECTURES = ("standard", "jumprelu", "topk")

    def __init__(self, folder: Path) -> None:
        self._config: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
        self._w = {name: tensor.double() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
        self._rescaled = self._config.get("rescale_acts_by_decoder_norm", False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """f [tokens, d_sae] of x [tokens, d_in], float64."""
        w = self._w
        sae_in = x - w["b_dec"] if self._config.get("apply_b_dec_to_input", True) else x
        pre = sae_in @ w["W_enc"] + w["b_enc"]
        if self._config["architecture"] == "jumprelu":
            return pre.relu() * (pre > w["threshold"])
        if self._config["architecture"] == "standard":
            return pre.relu()
        if self._rescaled:
            pre = pre * w["W_dec"].norm(dim=-1)
        top = pre.topk(self._config["k"], dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def decode(self, f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """xhat [tokens, d_in] of f [tokens, d_sae], float64."""
        if self._rescaled:
            f = f / self._w["W_dec"].norm(dim=-1)
        return f @ self._w["W_dec"] + self._w["b_dec"]


class ReferenceModel:
    """A model in fp32 on the CPU, whose stream can be seen and replaced at one layer.

    Raises EvalError where its layers or its head are not where they are looked for.
    """

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM

        self._network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        config = self._network.config.get_text_config()
        try:
            self._layers = decoder_layers(self._network, config.num_hidden_layers)
            self._norm = final_norm(self._network, self._layers, config.hidden_size)
        except LayoutError as error:
            raise EvalError(f"{model}: {error}") from None
        self.last_layer = config.num_hidden_layers - 1
        self._check_head(model)

    @torch.inference_mode()
    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """[n, vocab] from the stream after the last layer, [n, d_model]: final norm and unembedding."""
        return self._network.get_output_embeddings()(self._norm(final.float()))

    @torch.inference_mode()
    def observe(self, tokens: Sequence[int], layer: int, sae: ReferenceSAE, skip_first: int) -> Observation:
        """One sequence, clean, spliced and zeroed at the output of `layer` from token `skip_first` on."""
        clean, streams = self._run(tokens, {})
        x = streams[layer].double()
        f = sae.encode(x)
        xhat = sae.decode(f, x)

        def splice(stream: torch.Tensor) -> torch.Tensor:
            return torch.cat([stream[:skip_first], xhat[skip_first:].float()])

        def zero(stream: torch.Tensor) -> torch.Tensor:
            return torch.cat([stream[:skip_first], torch.zeros_like(stream[skip_first:])])

        spliced, zeroed = self._run(tokens, {layer: splice})[0], self._run(tokens, {layer: zero})[0]
        following = torch.tensor(tokens[1:]).unsqueeze(-1)

        def loss(logprobs: torch.Tensor) -> torch.Tensor:
            return -logprobs[:-1].gather(1, following).squeeze(-1)

        return Observation(
            x=x,
            xhat=xhat,
            active=f > 0,
            loss_clean=loss(clean),
            loss_sae=loss(spliced),
            loss_zero=loss(zeroed),
            kl_sae=kl_divergence(clean, spliced),
            kl_zero=kl_divergence(clean, zeroed),
        )

    def _run(
        self, tokens: Sequence[int], edits: dict[int, Callable[[torch.Tensor], torch.Tensor]]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """(log-probabilities [n, vocab], stream [n, d_model] after each layer, before its edit)."""
        streams: dict[int, torch.Tensor] = {}

        def hook(index: int) -> Any:
            def see(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
                stream = output if isinstance(output, torch.Tensor) else output[0]
                streams[index] = stream[0]
                if index not in edits:
                    return None
                edited = edits[index](stream[0]).unsqueeze(0)
                return edited if isinstance(output, torch.Tensor) else (edited, *output[1:])

            return see

        handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(self._layers)]
        try:
            logits = self._network(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits.log_softmax(-1), streams

    @torch.inference_mode()
    def _check_head(self, model: str) -> None:
        """Models may cap or scale their logits, so that they are proved to be what `logits` makes of the stream."""
        logprobs, streams = self._run(range(1, 9), {})
        ours = self.logits(streams[self.last_layer]).log_softmax(-1)
        error = float((ours - logprobs).abs().max() / logprobs.abs().max())
        if not error <= HEAD_TOLERANCE:
            raise EvalError(f"{model}: its logits are not final norm and unembedding (off by {error:.1e})")
