"""What the kernels' launchers are built on: how tiles are chosen, what scratch memory they take."""

import math
from fractions import Fraction

import pytest
import torch

from steer_kernels import workspace
from steer_kernels.tile_shapes import FAILING_ROWS, FEATURES, slots_per_tile

BENCHMARKED = [(16_384, 64), (32_768, 64), (65_536, 64), (131_072, 64), (131_072, 256), (1_048_576, 128)]


def failing_rows(d_sae, expected, slots):
    """The union bound over tiles of P(at least `slots` hits in one), in exact arithmetic."""
    n_tiles = math.ceil(d_sae / FEATURES)
    p = Fraction(1, n_tiles)
    few = sum(math.comb(expected, i) * p**i * (1 - p) ** (expected - i) for i in range(slots))
    return n_tiles * (1 - few)


@pytest.mark.parametrize(("d_sae", "expected"), [*BENCHMARKED, (4_608, 32), (16_384, 1), (640, 3)])
def test_tiles_keep_as_few_as_the_bound_allows(d_sae, expected):
    slots = slots_per_tile(d_sae, expected)
    assert failing_rows(d_sae, expected, slots) <= FAILING_ROWS
    enough = slots * math.ceil(d_sae / FEATURES) >= expected
    assert enough
    fewer = slots - 1
    assert failing_rows(d_sae, expected, fewer) > FAILING_ROWS or fewer * math.ceil(d_sae / FEATURES) < expected


@pytest.mark.parametrize(("d_sae", "expected"), [(1, 1), (100, 60), (128, 128), (129, 100), (300, 300)])
def test_small_saes_keep_what_is_asked_for(d_sae, expected):
    assert 1 <= slots_per_tile(d_sae, expected) <= min(d_sae, FEATURES)


def test_pieces_are_aligned_and_apart():
    device = torch.device("cpu")
    shapes = [((3, 5), torch.int64), ((7,), torch.int32), ((1,), torch.float32)]
    pieces = workspace.carve(device, *shapes)
    for i, piece in enumerate(pieces):
        assert (tuple(piece.shape), piece.dtype) == shapes[i]
        assert (piece.data_ptr() - pieces[0].data_ptr()) % workspace.ALIGNMENT == 0
        piece.fill_(i)
    assert [int(piece.flatten()[0]) for piece in pieces] == [0, 1, 2]


def test_the_buffer_stays_where_it_is():
    """A captured graph writes where it wrote, also after a larger kernel came by."""
    device = torch.device("cpu")
    (small,) = workspace.carve(device, ((64,), torch.int32))
    (again,) = workspace.carve(device, ((64,), torch.int32))
    assert again.data_ptr() == small.data_ptr()
    workspace.reserve(device, 2 * workspace.held_bytes(device) + 1)
    small.fill_(7)
    (large,) = workspace.carve(device, ((64,), torch.int32))
    assert large.data_ptr() != small.data_ptr()
    large.zero_()
    assert bool((small == 7).all())


@pytest.mark.parametrize(("d_sae", "k"), BENCHMARKED)
@pytest.mark.parametrize("tokens", [1, 256, 2048])
def test_scratch_is_a_fraction_of_the_pre_activations(d_sae, k, tokens):
    from steer_kernels.encode_threshold import triton_kernel as threshold
    from steer_kernels.encode_topk import triton_kernel as topk

    pre_activations = 4 * tokens * d_sae
    pieces = topk.workspace_pieces(tokens, d_sae, k, topk.default_slots(d_sae, k))
    assert sum(math.prod(shape) * dtype.itemsize for shape, dtype in pieces) < 0.2 * pre_activations
    pieces = threshold.workspace_pieces(tokens, d_sae, 4 * k, slots_per_tile(d_sae, k))
    assert sum(math.prod(shape) * dtype.itemsize for shape, dtype in pieces) < 0.2 * pre_activations
