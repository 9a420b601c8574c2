"""The whole-SAE kernels in a CUDA graph: captured with one input, a replay answers for another what a call answers.

So launches depend on shapes alone, and nothing waits for the device: rows that fail their certificate, lists that
overflow and tokens that ask for nothing are dealt with there.
"""

import pytest
import torch

from steer_kernels.eight_bit import quantise
from tests.kernels.sae_cases import real_encoder, same
from tests.launch_recorder import captured

TOKENS, D_IN, D_SAE, K, GIVEN = 5, 24, 300, 9, 3


KERNELS = (
    "encode_topk",
    "encode_topk, absolute",
    "encode_threshold",
    "count_above",
    "encode_topk_screened",
    "count_above_screened",
    "decode_sparse",
)


def launches(name, x, W, b, scale, given):
    """A call of one kernel on buffers that stay where they are; few slots, so that tiles are run again."""
    from steer_kernels.count_above.triton_kernel import count_above_triton
    from steer_kernels.count_above_screened.triton_kernel import count_above_screened_triton
    from steer_kernels.decode_sparse.triton_kernel import decode_sparse_triton
    from steer_kernels.encode_threshold.triton_kernel import encode_threshold_triton
    from steer_kernels.encode_topk.triton_kernel import encode_topk_triton
    from steer_kernels.encode_topk_screened.triton_kernel import encode_topk_screened_triton

    eight_bit, threshold = quantise(W), torch.full((D_SAE,), 1.5, device=x.device)

    def call():
        if name == "count_above":
            return count_above_triton(x, W, b, given, 0.5, False, scale)
        if name == "count_above_screened":
            counted = count_above_screened_triton(x, W, b, eight_bit, given, K, 0.5, capacity=16)
            return counted.p, counted.ahead
        if name == "decode_sparse":
            return (decode_sparse_triton(given, x[:, :GIVEN], W, b[:D_IN], scale, None, torch.float32),)
        if name == "encode_threshold":
            encoded = encode_threshold_triton(x, W, b, threshold, K, scale, slots=1)
            return encoded.values, encoded.features, encoded.counts
        if name == "encode_topk_screened":
            encoded = encode_topk_screened_triton(x, W, b, eight_bit, K, capacity=16, slots=1)
        else:
            absolute = name == "encode_topk, absolute"
            encoded = encode_topk_triton(x, W, b, K, absolute, None if absolute else scale, slots=1)
        return encoded.values, encoded.features

    return call


@pytest.mark.parametrize("name", KERNELS)
def test_a_replay_answers_what_a_call_does(triton_device, name):
    x, W, b, scale = (t.to(triton_device) for t in real_encoder(TOKENS, D_IN, D_SAE, torch.float32))
    given = torch.randint(0, D_SAE, (TOKENS, GIVEN), dtype=torch.int32).to(triton_device)
    call = launches(name, x, W, b, scale, given)
    results = []
    graph = captured(lambda: results.append(call()), triton_device)
    answer = results[-1]

    generator = torch.Generator().manual_seed(1)
    inputs = {
        "other tokens": torch.randn(TOKENS, D_IN, generator=generator),
        # Along one feature: its tile has all that is large.
        "one tile": 50 * W[:1].cpu().expand(TOKENS, D_IN),
        "nothing is active": torch.zeros(TOKENS, D_IN),
        "not numbers": torch.full((TOKENS, D_IN), float("nan")),
    }
    distinct = set()
    for i, values in enumerate(inputs.values()):
        x.copy_(values)
        given.copy_(torch.randint(-1, D_SAE, (TOKENS, GIVEN), dtype=torch.int32, generator=generator))
        scale.fill_(1.0 + i)
        graph.replay()
        replayed = [part.clone() for part in answer]
        for one, other in zip(replayed, call(), strict=True):
            same(one, other)
        distinct.add(tuple(str(part.nan_to_num().tolist()) for part in replayed))
    assert len(distinct) > 1
