"""The canonical SAE: what every family's loader returns and the engine reads rows from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sae_models.activation import Activation
from sae_models.errors import SAEFormatError
from sae_models.feature_matrix import FeatureMatrix
from sae_models.folding import IDENTITY, AffineMap
from sae_models.hook_points import HookPoint
from sae_models.selection import Selection
from sae_models.tensor_source import TensorSource
from sae_models.token_norm import TokenNorm, centred, token_scales

__all__ = ["SAE", "FeatureRows", "SAEFormatError", "SkipMatrix", "Weights"]

FEATURES_AT_ONCE = 2048


@dataclass(frozen=True)
class FeatureRows:
    """What an edit of one feature needs, in units of the stream that the SAE reads and writes, float32.

    Its pre-activation on a token x is p = a(x) * (x @ encoder) + bias, its activation p where p > threshold, else 0
    (and 0 where the SAE's selection drops it). `decoder` is what a unit of activation writes, times s(x). a and s are 1
    without a token norm, see `token_norm.token_scales`.
    """

    encoder: torch.Tensor
    decoder: torch.Tensor
    bias: float
    threshold: float


@dataclass(frozen=True)
class SkipMatrix:
    """W_skip of a skip transcoder, left on disk: an edit of a feature has no use for it.

    transposed: it is stored as [d_in, d_out].
    """

    source: TensorSource
    name: str
    transposed: bool = False

    def read(self) -> torch.Tensor:
        """[d_out, d_in], float32."""
        stored = self.source.read(self.name).float()
        return stored.T if self.transposed else stored


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds, and the maps that turn it into rows on the model's own activations.

    W_enc, W_dec: as stored. b_dec: [d_out] float64, in training space. input_map: from the activations (after the token
    norm, if any) to training space, with b_dec or whatever else is subtracted from the input; output_map: back.
    W_skip: of skip transcoders. router: (W [d_in, groups], b [groups]) float64, on activations.
    """

    W_enc: FeatureMatrix
    W_dec: FeatureMatrix
    b_dec: torch.Tensor
    activation: Activation
    input_map: AffineMap = IDENTITY
    output_map: AffineMap = IDENTITY
    W_skip: SkipMatrix | None = None
    router: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class SAE:
    """A sparse autoencoder or transcoder, its large matrices left on disk.

    family, architecture: the format it came in and its published kind, for people.
    d_in, d_out: width of what it reads and writes, equal but for transcoders. d_sae: features.
    hook_points: where it reads; several for a Layer Group, one SAE on several layers. hook_points_out: where it writes,
        in the same order; the same places but for transcoders.
    token_norm: what each token is divided by before it is read.
    model_name: what it was trained on, where the checkpoint says so.
    skip_first: tokens at the start of a sequence that the SAE was not trained on, from its card.
    folder: where it lies, with its card and its features' file.
    sha256: of configuration, weights and options together; two SAEs with the same value do the same.
    """

    name: str
    family: str
    architecture: str
    d_in: int
    d_out: int
    d_sae: int
    hook_points: tuple[HookPoint, ...]
    hook_points_out: tuple[HookPoint, ...]
    token_norm: TokenNorm
    model_name: str | None
    skip_first: int
    folder: Path
    sha256: str
    weights: Weights

    @property
    def selection(self) -> Selection | None:
        """Which features survive by comparison; None where each is decided by its own threshold."""
        return self.weights.activation.selection

    @property
    def hook_point(self) -> HookPoint:
        """Where it reads: the only place, or the first of a Layer Group's."""
        return self.hook_points[0]

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.hook_points != self.hook_points_out

    def rows(self, feature: int) -> FeatureRows:
        """The rows of one feature, 0 <= feature < d_sae, everything folded."""
        w_enc = self.weights.W_enc.row(feature).unsqueeze(0)
        w_dec = self.weights.W_dec.row(feature).unsqueeze(0)
        encoder, bias, decoder = self._folded(slice(feature, feature + 1), w_enc, w_dec)
        threshold = float(self.weights.activation.threshold[feature])
        return FeatureRows(encoder[0].float(), decoder[0].float(), float(bias[0]), threshold)

    def encoder(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(W_enc [d_in, d_sae], b_enc [d_sae]) of the whole SAE, float32, everything folded.

        The row of each feature lies together in memory, as kernels read it: W_enc is a view of [d_sae, d_in].
        """
        rows = torch.empty(self.d_sae, self.d_in)
        b_enc = torch.empty(self.d_sae)
        for features in self._spans():
            norm = None
            if self.weights.activation.rescale_by_decoder_norm:
                _, norm = self._folded_decoder(self.weights.W_dec.block(features.start, features.stop))
            w_enc = self.weights.W_enc.block(features.start, features.stop)
            encoder, bias = self._folded_encoder(features, w_enc, norm)
            rows[features], b_enc[features] = encoder.float(), bias.float()
        return rows.T, b_enc

    def decoder(self) -> torch.Tensor:
        """W_dec [d_sae, d_out] of the whole SAE, float32, everything folded."""
        blocks = (self.weights.W_dec.block(features.start, features.stop) for features in self._spans())
        return torch.cat([self._folded_decoder(w_dec)[0].float() for w_dec in blocks])

    def thresholds(self) -> torch.Tensor:
        """[d_sae], float32."""
        return self.weights.activation.threshold.float()

    def router(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(W [d_in, groups], b [groups]) float32, of a routed selection: scores are x @ W + b."""
        assert self.weights.router is not None
        W, b = self.weights.router
        return W.float(), b.float()

    def reconstruction_bias(self) -> torch.Tensor:
        """What a reconstruction adds to the sum of activations times decoder rows: [d_out], float32.

        With a token norm it is in normalised units: multiplied by s(x), and mean(x) is added for `layer_norm`.
        """
        return self.weights.output_map.apply(self.weights.b_dec.unsqueeze(0))[0].float()

    def skip(self) -> torch.Tensor | None:
        """W_skip [d_out, d_in] float32, of a skip transcoder: its output has x @ W_skip.T in it."""
        return None if self.weights.W_skip is None else self.weights.W_skip.read()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [n, d_sae] of tokens x [n, d_in], in x's precision (float32 or float64)."""
        W_enc, b_enc = (tensor.to(x) for tensor in self.encoder())
        a, _ = token_scales(x, self.token_norm)
        pre_acts = a * (x @ W_enc) + b_enc
        return self.activate(pre_acts, x)

    def activate(self, pre_acts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Activations [n, d_sae] from pre-activations [n, d_sae] of tokens x [n, d_in]."""
        acts = torch.where(pre_acts > self.weights.activation.threshold.to(x), pre_acts, 0.0)
        if self.selection is None:
            return acts
        acts = torch.where(self.selection.keep(pre_acts), acts, 0.0)
        if self.weights.router is not None:
            W, b = (tensor.to(x) for tensor in self.weights.router)
            weights = self.selection.route(x @ W + b)
            acts = acts * weights.repeat_interleave(self.d_sae // self.selection.groups, dim=-1)
        return acts

    def decode(self, activations: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The reconstruction [n, d_out] from activations [n, d_sae] of tokens x [n, d_in], in x's precision."""
        _, s = token_scales(x, self.token_norm)
        out = s * (activations @ self.decoder().to(x) + self.reconstruction_bias().to(x))
        if self.token_norm == "layer_norm":
            out = out + x.mean(-1, keepdim=True)
        skip = self.skip()
        return out if skip is None else out + x @ skip.to(x).T

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(features, encoder [n, d_in], bias [n], decoder [n, d_out]) of all features in turn, float64, folded."""
        for features in self._spans():
            w_enc, w_dec = (W.block(features.start, features.stop) for W in (self.weights.W_enc, self.weights.W_dec))
            yield features, *self._folded(features, w_enc, w_dec)

    def _spans(self) -> Iterator[slice]:
        for start in range(0, self.d_sae, FEATURES_AT_ONCE):
            yield slice(start, min(start + FEATURES_AT_ONCE, self.d_sae))

    def _folded(
        self, features: slice, w_enc: torch.Tensor, w_dec: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(encoder, bias, decoder) of some features from their stored rows [n, d_in] and [n, d_out], float64."""
        decoder, norm = self._folded_decoder(w_dec)
        return *self._folded_encoder(features, w_enc, norm), decoder

    def _folded_decoder(self, w_dec: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(rows, the norms that their encoder rows and biases are multiplied by), of stored rows [n, d_out]."""
        decoder = self.weights.output_map.linear(w_dec)
        if not self.weights.activation.rescale_by_decoder_norm:
            return decoder, None
        norm = decoder.norm(dim=-1)
        # A row of zeros stays one; its activation is 0.
        return decoder / norm.unsqueeze(-1).clamp(min=torch.finfo(norm.dtype).tiny), norm

    def _folded_encoder(
        self, features: slice, w_enc: torch.Tensor, norm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, biases) of stored rows [n, d_in]; norm [n]: of their decoder rows, where they are multiplied by it."""
        weights, activation = self.weights, self.weights.activation
        encoder = weights.input_map.transposed(w_enc)
        offset = weights.input_map.offset(w_enc)
        if activation.gain is not None:
            gain = activation.gain[features]
            encoder, offset = encoder * gain.unsqueeze(-1), offset * gain
        bias = activation.bias[features] + offset
        if norm is not None:
            encoder, bias = encoder * norm.unsqueeze(-1), bias * norm
        return centred(encoder, self.token_norm), bias
