"""count_above_screened returns count_above's counts, cut off at k, whether its screen was enough or not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_kernels.count_above import count_above_reference
from steer_kernels.count_above_screened import count_above_screened
from steer_kernels.eight_bit import EIGHT_BIT_DTYPES, quantise
from tests.kernels.conftest import INTERPRETED
from tests.kernels.sae_cases import DRAWN, DTYPES, count_above, encoder, place, real_encoder, same, shapes
from tests.kernels.test_count_above import given_features
from tests.kernels.test_encode_topk_screened import sparse_tokens

EIGHT_BITS = list(EIGHT_BIT_DTYPES)
INF = float("inf")


def screened(device, x, W, b, features, k, floor, absolute=False, scale=None, dtype=torch.int8):
    """(p, ahead) of the op, or of what it launches on a GPU."""
    x, W, b, features, scale = place(device, x, W, b, features, scale)
    copy = quantise(W, dtype)
    if device == "interpreter":
        from steer_kernels.count_above_screened.triton_kernel import count_above_screened_triton

        counted = count_above_screened_triton(x, W, b, copy, features, k, floor, absolute, scale)
        return counted.p, counted.ahead
    tensors = (copy.weights, copy.step, copy.slack, copy.longest)
    return [t.cpu() for t in count_above_screened(x, W, b, *tensors, features, k, floor, absolute, scale)]


def launch(triton_device, x, W, b, features, k, floor, **more):
    """What the launcher says of its screen, after its counts are seen to be right."""
    from steer_kernels.count_above.triton_kernel import count_above_triton
    from steer_kernels.count_above_screened.triton_kernel import count_above_screened_triton

    x, W, b, features = (t.to(triton_device) for t in (x, W, b, features))
    counted = count_above_screened_triton(x, W, b, quantise(W), features, k, floor, **more)
    p, ahead = count_above_triton(x, W, b, features, floor)
    same(counted.p.cpu(), p.cpu())
    same(counted.ahead.cpu(), ahead.clamp(max=k).cpu())
    return counted.ranked.cpu(), counted.uncertain.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absolute", [False, True])
def test_real_numbers(device, dtype, absolute):
    """The counts of count_above to the bit, of features that are among the k and of others."""
    tokens, d_sae, k = (2, 300, 7) if INTERPRETED else (40, 5000, 32)
    x, W, b, scale = real_encoder(tokens, 70, d_sae, dtype)
    features = given_features(tokens, d_sae, 40)
    features[0, :k] = (x[0].float() @ W.float().T).topk(k).indices
    for floor in (0.0, -INF):
        p, ahead = screened(device, x, W, b, features, k, floor, absolute, scale)
        expected_p, expected_ahead = count_above(device, x, W, b, features, floor, absolute, scale)
        same(p, expected_p)
        same(ahead, expected_ahead.clamp(max=k))
    assert bool((ahead[0] < k).any())


@DRAWN
@given(shapes(), st.sampled_from(DTYPES), st.sampled_from(EIGHT_BITS), st.booleans(), st.data())
def test_drawn_ties(device, shape, dtype, eight_bits, absolute, data):
    if device == "cuda" and eight_bits != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        eight_bits = torch.int8
    tokens, d_in, d_sae, seed = shape
    x, W, b, scale = encoder(tokens, d_in, d_sae, dtype, seed, bound=data.draw(st.integers(0, 3)))
    k, scale = data.draw(st.integers(1, min(d_sae, 40))), data.draw(st.sampled_from([None, scale]))
    floor = data.draw(st.sampled_from([-INF, 0.0, 10.0, INF]))
    features = given_features(tokens, d_sae, data.draw(st.integers(1, 20)), seed)
    features = features.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    p, ahead = screened(device, x, W, b, features, k, floor, absolute, scale, eight_bits)
    expected_p, expected_ahead = count_above_reference(x, W, b, features, floor, absolute, scale)
    same(p, expected_p)
    same(ahead, expected_ahead.clamp(max=k))


@pytest.mark.parametrize("absolute", [False, True])
def test_nan_and_infinity(device, absolute):
    x, W, b, _ = encoder(6, 9, 200, torch.float32)
    x[1, 2], x[3, 0] = float("nan"), INF
    b[17], b[18], b[19] = float("nan"), INF, -INF
    features = given_features(6, 200, 30)
    features[:, 0], features[:, 1], features[:, 2] = 17, 18, 19
    p, ahead = screened(device, x, W, b, features, 12, -INF, absolute)
    expected_p, expected_ahead = count_above_reference(x, W, b, features, -INF, absolute)
    same(p, expected_p)
    same(ahead, expected_ahead.clamp(max=12))


def test_nothing_given(device):
    for shape in ((0, 3), (4, 0)):
        features = torch.zeros(shape, dtype=torch.int64)
        p, ahead = screened(device, torch.zeros(shape[0], 4), torch.zeros(9, 4), torch.zeros(9), features, 3, 0.0)
        assert p.shape == ahead.shape == shape


def test_tokens_with_nothing_to_rank_read_neither_encoder_nor_copy(triton_device):
    """A token whose given feature is off, in a tile of its own, between tiles that have one to rank."""
    x, W, b = sparse_tokens(65, 16, 150, torch.float32)
    features = torch.full((65, 2), -1)
    features[0, 0] = features[64, 1] = 7
    # Tiles of float32 are 32 tokens tall: NaN in the second would leave its tokens uncertain if they were screened.
    x[32:64] = float("nan")
    features[40, 0] = 9
    ranked, uncertain = launch(triton_device, x, W, b, features, 4, -INF)
    assert ranked.nonzero().flatten().tolist() == [0, 64]
    assert not bool(uncertain[1:64].any())


def test_a_screen_is_enough_where_features_stand_out(triton_device):
    """Neighbours nearer than the copy's bound, all among the k: the border of the k is clear all the same."""
    x, W, b = sparse_tokens(2, 64, 700, torch.bfloat16)
    strongest = (x.float() @ W.float().T).topk(4).indices
    W[600], W[601] = W[strongest[0, 0]], W[strongest[0, 0]]
    features = torch.stack([torch.tensor([600, 601, 5]), strongest[1, :3]])
    ranked, uncertain = launch(triton_device, x, W, b, features, 6, 0.0)
    assert ranked.tolist() == [1, 1]
    assert uncertain.tolist() == [0, 0]


def test_ties_nearer_than_the_bound_read_the_encoder(triton_device):
    x, W, b = torch.ones(2, 5), torch.ones(150, 5), torch.zeros(150)
    features = torch.tensor([[3, 140], [-1, -1]])
    ranked, uncertain = launch(triton_device, x, W, b, features, 10, 0.0, capacity=20)
    assert ranked.tolist() == [1, 0]
    assert uncertain.tolist() == [1, 0]


def test_too_many_features_are_an_error(triton_device):
    from steer_kernels.count_above_screened.triton_kernel import count_above_screened_triton

    x, W, b, features = (
        t.to(triton_device) for t in (torch.ones(1, 2), torch.ones(3, 2), torch.ones(3), torch.zeros(1, 129).long())
    )
    with pytest.raises(ValueError, match="at most 128 a token, not 129"):
        count_above_screened_triton(x, W, b, quantise(W), features, 1, 0.0)
