"""The custom op, which runs where its tensors are, and what to do about lists that were too short."""

from __future__ import annotations

import torch

from steer_kernels.encode_threshold.torch_path import encode_threshold_torch
from steer_kernels.pre_activations import check_encoder

Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _check(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    threshold: torch.Tensor,
    capacity: int,
    scale: torch.Tensor | None,
) -> None:
    check_encoder(x, encoder, b_enc, scale)
    if threshold.shape != b_enc.shape or threshold.dtype != torch.float32:
        raise ValueError(f"threshold must be [{len(b_enc)}] float32, not {list(threshold.shape)} {threshold.dtype}")
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, not {capacity}")


def _encode_threshold_cpu(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    threshold: torch.Tensor,
    capacity: int,
    scale: torch.Tensor | None,
) -> Lists:
    _check(x, encoder, b_enc, threshold, capacity, scale)
    return encode_threshold_torch(x, encoder, b_enc, threshold, capacity, scale)


def _encode_threshold_gpu(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    threshold: torch.Tensor,
    capacity: int,
    scale: torch.Tensor | None,
) -> Lists:
    # Machines without a GPU need no Triton.
    from steer_kernels.encode_threshold.triton_kernel import encode_threshold_triton

    _check(x, encoder, b_enc, threshold, capacity, scale)
    encoded = encode_threshold_triton(x, encoder, b_enc, threshold, capacity, scale)
    return encoded.values, encoded.features, encoded.counts


def _encode_threshold_fake(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    threshold: torch.Tensor,
    capacity: int,
    scale: torch.Tensor | None,
) -> Lists:
    shape = (x.shape[0], capacity)
    return (
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(x.shape[0], dtype=torch.int32),
    )


_library = torch.library.Library("steer_kernels", "FRAGMENT")
_library.define(
    "encode_threshold(Tensor x, Tensor encoder, Tensor b_enc, Tensor threshold, int capacity, Tensor? scale)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("encode_threshold", _encode_threshold_cpu, "CPU")
_library.impl("encode_threshold", _encode_threshold_gpu, "CUDA")
torch.library.register_fake("steer_kernels::encode_threshold", _encode_threshold_fake, lib=_library)

encode_threshold = torch.ops.steer_kernels.encode_threshold
"""encode_threshold(x, encoder, b_enc, threshold, capacity, scale): as `encode_threshold_reference`, p in float32."""


def encode_threshold_all(
    x: torch.Tensor,
    encoder: torch.Tensor,
    b_enc: torch.Tensor,
    threshold: torch.Tensor,
    capacity: int,
    scale: torch.Tensor | None,
) -> Lists:
    """As `encode_threshold`, with lists as long as the longest, so that they hold every active feature.

    `capacity` is what is tried first; tokens with more active features are run again. Waits for the device, so it has
    no place inside a CUDA graph: there, counts above the capacity say which tokens' lists are cut off.
    """
    values, features, counts = encode_threshold(x, encoder, b_enc, threshold, capacity, scale)
    longest = int(counts.max()) if len(counts) else 0
    if longest <= capacity:
        return values, features, counts
    over = (counts > capacity).nonzero().squeeze(-1)
    longer_values = values.new_zeros(len(values), longest)
    longer_features = features.new_full((len(features), longest), -1)
    longer_values[:, :capacity], longer_features[:, :capacity] = values, features
    again = encode_threshold(x[over], encoder, b_enc, threshold, longest, None if scale is None else scale[over])
    longer_values[over], longer_features[over], counts[over] = again
    return longer_values, longer_features, counts
