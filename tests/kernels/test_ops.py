"""The custom ops of the whole-SAE kernels: schema, fake implementation, errors."""

import pytest
import torch

from steer_kernels.count_above import count_above
from steer_kernels.count_above_screened import count_above_screened
from steer_kernels.decode_sparse import decode_sparse
from steer_kernels.eight_bit import quantise
from steer_kernels.encode_threshold import encode_threshold
from steer_kernels.encode_topk import encode_topk
from steer_kernels.encode_topk_screened import encode_topk_screened
from tests.kernels.sae_cases import encoder

X, W, B, SCALE = encoder(5, 8, 40, torch.float32)
FEATURES = torch.arange(10).view(5, 2)
COPY = quantise(W)
EIGHT_BIT = (COPY.weights, COPY.step, COPY.slack, COPY.longest)
CALLS = [
    (encode_topk, (X, W, B, 6, False, None)),
    (encode_topk, (X.half(), W.half(), B, 6, True, SCALE)),
    (encode_topk_screened, (X, W, B, *EIGHT_BIT, 6, False, None)),
    (encode_topk_screened, (X.half(), W.half(), B, *EIGHT_BIT, 6, True, SCALE)),
    (encode_threshold, (X, W, B, torch.zeros(40), 7, None)),
    (encode_threshold, (X.bfloat16(), W.bfloat16(), B, torch.zeros(40), 7, SCALE)),
    (count_above, (X, W, B, FEATURES, 0.0, False, None)),
    (count_above, (X, W, B, FEATURES.int(), float("-inf"), True, SCALE)),
    (count_above_screened, (X, W, B, *EIGHT_BIT, FEATURES, 6, 0.0, False, None)),
    (count_above_screened, (X.half(), W.half(), B, *EIGHT_BIT, FEATURES.int(), 6, float("-inf"), True, SCALE)),
    (decode_sparse, (FEATURES, FEATURES.float(), W, None, None, None, torch.float32)),
    (decode_sparse, (FEATURES, FEATURES.float(), W.half(), X[0], SCALE, X, torch.bfloat16)),
]


@pytest.mark.parametrize(("op", "arguments"), CALLS)
def test_registration(op, arguments):
    """torch's own checks: the schema tells what is mutated, and the fake implementation tells shapes and dtypes."""
    registered = getattr(torch.ops.steer_kernels, op.__name__)
    torch.library.opcheck(registered, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("arguments", [arguments for op, arguments in CALLS if op is encode_topk])
def test_the_short_way_on_a_cpu_is_the_op(arguments):
    expected = torch.ops.steer_kernels.encode_topk(*arguments)
    with torch.inference_mode():
        got = encode_topk(*arguments)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("grad", [True, False])
def test_fake_tensors_never_go_the_short_way(grad):
    with torch._subclasses.FakeTensorMode() as mode, torch.set_grad_enabled(grad):
        values, features = encode_topk(*(mode.from_tensor(t) for t in (X, W, B)), 6, False, None)
    assert values.shape == features.shape == (5, 6)


def test_results_lie_as_a_compiled_model_takes_them_to():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert all(result.is_contiguous() for result in encode_topk(x, W, B, 6, False, None))


def test_a_compiled_model_calls_them_without_a_break():
    def splice(x, W, b):
        pre, features = encode_topk(x, W, b, 6, False, None)
        return decode_sparse(features, pre.relu(), W, None, None, None, torch.float32)

    compiled = torch.compile(splice, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5):
        torch.testing.assert_close(compiled(X[:tokens], W, B), splice(X[:tokens], W, B), rtol=0, atol=0)


ERRORS = [
    (encode_topk, (X, W[:, :7], B, 6, False, None), r"x and encoder must be .* not \[5, 8\] and \[40, 7\]"),
    (encode_topk, (X, W.half(), B, 6, False, None), "must both be float32, float16 or bfloat16, not torch.float32 and"),
    (encode_topk, (X, W, B[:3], 6, False, None), r"b_enc must be \[40\] float32, not \[3\]"),
    (encode_topk, (X, W, B, 6, False, SCALE.double()), r"scale must be \[5\] float32, not \[5\] torch.float64"),
    (encode_topk, (X, W, B, 41, False, None), "k must be between 1 and d_sae = 40, not 41"),
    (encode_topk, (X, W, B, 0, False, None), "k must be between 1 and d_sae = 40, not 0"),
    (encode_topk_screened, (X, W, B, COPY.weights.T, *EIGHT_BIT[1:], 6, False, None), "make them with steer_kernels"),
    (encode_threshold, (X, W, B, torch.zeros(3), 7, None), r"threshold must be \[40\] float32, not \[3\]"),
    (encode_threshold, (X, W, B, torch.zeros(40), 0, None), "capacity must be at least 1, not 0"),
    (count_above, (X, W, B, FEATURES[:4], 0.0, False, None), r"features must be \[5, n\] int32 or int64, not \[4, 2\]"),
    (count_above_screened, (X, W, B, *EIGHT_BIT, FEATURES[:4], 6, 0.0, False, None), r"features must be \[5, n\] int"),
    (count_above_screened, (X, W, B, *EIGHT_BIT, FEATURES, 41, 0.0, False, None), "between 1 and d_sae = 40, not 41"),
    (decode_sparse, (FEATURES, FEATURES[:4].float(), W, None, None, None, torch.float32), r"must be \[tokens, n\]"),
    (decode_sparse, (FEATURES, FEATURES.float(), W.T, None, None, None, torch.float32), "decoder must have its rows"),
    (decode_sparse, (FEATURES, FEATURES.float(), W, B, None, None, torch.float32), r"b_dec must be \[8\], not \[40\]"),
]


@pytest.mark.parametrize(("op", "arguments", "message"), ERRORS)
def test_errors_say_what_does_not_fit(op, arguments, message):
    with pytest.raises(ValueError, match=message):
        op(*arguments)
