"""The canonical SAE: what every family's loader returns and the engine reads rows from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from sae_models.hook_points import HookPoint

Architecture = Literal["standard", "jumprelu", "topk"]


class SAEFormatError(ValueError):
    """A checkpoint that cannot be read as what it claims to be."""


@dataclass(frozen=True)
class FeatureRows:
    """What an edit of one feature needs, in residual-stream units, float32.

    Its pre-activation is `x @ encoder + bias`; its activation is that value where it exceeds `threshold`, else 0
    (and 0 for a TopK SAE where it is not among the k largest). `decoder` is what a unit of activation writes.
    """

    encoder: torch.Tensor
    decoder: torch.Tensor
    bias: float
    threshold: float


@dataclass(frozen=True)
class SAE:
    """A sparse autoencoder on the residual stream, its weights left on disk.

    Names follow SAELens: W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc [d_sae], b_dec [d_in], threshold [d_sae].

    apply_b_dec_to_input: pre-activations are of x - b_dec. Folded into the bias here, in float64.
    rescale_acts_by_decoder_norm: TopK ranks pre-activations times the decoder row's norm, and that product is the
        activation (SAELens `topk_sae.py`). Folded into encoder and decoder rows here.
    sha256: of configuration and weights together; two SAEs with the same value do the same.
    skip_first: tokens at the start of a sequence that the SAE was not trained on, from its card.
    """

    name: str
    architecture: Architecture
    d_in: int
    d_sae: int
    hook_point: HookPoint
    k: int | None
    model_name: str | None
    skip_first: int
    apply_b_dec_to_input: bool
    rescale_acts_by_decoder_norm: bool
    weights: Path
    sha256: str

    @cached_property
    def _file(self) -> safe_open:
        return safe_open(self.weights, framework="pt")

    @cached_property
    def _b_enc(self) -> torch.Tensor:
        return self._file.get_tensor("b_enc").double()

    @cached_property
    def _b_dec(self) -> torch.Tensor:
        return self._file.get_tensor("b_dec").double()

    @cached_property
    def _threshold(self) -> torch.Tensor:
        if self.architecture == "jumprelu":
            # ReLU comes first, so a threshold below zero is a threshold of zero.
            return self._file.get_tensor("threshold").double().clamp(min=0.0)
        return torch.zeros(self.d_sae, dtype=torch.float64)

    def rows(self, feature: int) -> FeatureRows:
        """The rows of one feature, 0 <= feature < d_sae, everything folded."""
        encoder = self._file.get_slice("W_enc")[:, feature : feature + 1].squeeze(1).double()
        decoder = self._file.get_slice("W_dec")[feature : feature + 1].squeeze(0).double()
        bias = self._b_enc[feature].clone()
        if self.apply_b_dec_to_input:
            bias -= self._b_dec @ encoder
        if self.rescale_acts_by_decoder_norm:
            norm = decoder.norm()
            encoder, bias, decoder = encoder * norm, bias * norm, decoder / norm
        return FeatureRows(encoder.float(), decoder.float(), float(bias), float(self._threshold[feature]))

    def reconstruction_bias(self) -> torch.Tensor:
        """What a reconstruction adds to the sum of activations times decoder rows: b_dec [d_in], float32.

        Folding leaves it as it is: neither option changes what a feature contributes to the output.
        """
        return self._b_dec.float()

    def encoder(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(W_enc [d_in, d_sae], b_enc [d_sae]) of the whole SAE, float32, everything folded."""
        W_enc = self._file.get_tensor("W_enc").double()
        b_enc = self._b_enc.clone()
        if self.apply_b_dec_to_input:
            b_enc -= self._b_dec @ W_enc
        if self.rescale_acts_by_decoder_norm:
            norms = self._file.get_tensor("W_dec").double().norm(dim=1)
            W_enc, b_enc = W_enc * norms, b_enc * norms
        return W_enc.float(), b_enc.float()
