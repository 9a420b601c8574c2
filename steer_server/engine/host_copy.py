"""What a device computes, on its way to the host while the next work is prepared."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HostCopy:
    """A copy of a tensor as it is behind all work launched so far. arrived: when it is there; None where it is."""

    _values: torch.Tensor
    _arrived: torch.cuda.Event | None

    @staticmethod
    def of(values: torch.Tensor) -> HostCopy:
        """Begin to copy. A GPU is not waited for."""
        on_gpu = values.device.type == "cuda"
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu).copy_(values, non_blocking=True)
        if not on_gpu:
            return HostCopy(host, None)
        arrived = torch.cuda.Event()
        arrived.record()
        return HostCopy(host, arrived)

    def values(self) -> torch.Tensor:
        """The copy, on the host. Waits for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
