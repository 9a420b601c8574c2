"""One vector for each feature, left where the checkpoint stores it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from sae_models.row_file import NAME, row_file
from sae_models.tensor_source import SafetensorsFile, TensorSource

SMALL_BYTES = 1 << 26
"""Below this, a column is read out of its matrix; above, rows are cached in a file of their own."""


@dataclass(frozen=True)
class FeatureMatrix:
    """Vectors of `count` features, each of length `width`, in a tensor of `source`.

    axis: along which axis of the tensor the features lie. middle: of a tensor [features, n, width], which of the n.
    sha256: of the checkpoint, which cached rows are kept under.
    """

    source: TensorSource
    name: str
    axis: Literal[0, 1]
    sha256: str
    middle: int | None = None

    @property
    def count(self) -> int:
        return self.source.shape(self.name)[self.axis]

    @property
    def width(self) -> int:
        shape = self.source.shape(self.name)
        return shape[-1] if self.axis == 0 else shape[0]

    @cached_property
    def _rows(self) -> TensorSource | None:
        """The cached rows, where columns are too far apart to be read."""
        dtype = self.source.dtype(self.name)
        assert isinstance(dtype, torch.dtype)
        large = math.prod(self.source.shape(self.name)) * dtype.itemsize > SMALL_BYTES
        if self.axis == 1 and large and isinstance(self.source, SafetensorsFile):
            return row_file(self.source, self.name, self.sha256)
        return None

    def row(self, feature: int) -> torch.Tensor:
        """The vector [width] of one feature, float64."""
        if self._rows is not None:
            return self._rows.read(NAME, (slice(feature, feature + 1),)).squeeze(0).double()
        return self.block(feature, feature + 1).squeeze(0)

    def block(self, start: int, stop: int) -> torch.Tensor:
        """The vectors [stop - start, width] of features start to stop, float64."""
        features = slice(start, stop)
        if self.axis == 1:
            return self.source.read(self.name, (slice(None), features)).double().T
        if self.middle is not None:
            return self.source.read(self.name, (features, slice(self.middle, self.middle + 1))).squeeze(1).double()
        return self.source.read(self.name, (features,)).double()
