"""vLLM's AsyncLLM, used directly, with steering in SamplingParams.extra_args."""

import asyncio

import numpy as np
import pytest

from tests.e2e.tiny_models import LLAMA, tiny
from tests.tensors import inline

pytestmark = pytest.mark.engine

PROMPT = {"prompt_token_ids": list(range(5, 25))}
SPEC = {"vectors": [{"data": inline(np.linspace(-1, 1, 128)), "layers": [0, 2], "strength": 3.0}]}


async def test_async_llm(tmp_path):
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(tiny(tmp_path / "llama", LLAMA)),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
        )
    )

    async def generate(name, spec, kind=RequestOutputKind.FINAL_ONLY, **settings):
        params = SamplingParams(
            temperature=0,
            max_tokens=6,
            detokenize=False,
            logprobs=1,
            output_kind=kind,
            extra_args=None if spec is None else {"steering": spec},
            **settings,
        )
        return [output async for output in engine.generate(PROMPT, params, request_id=name)]

    try:
        plain, steered, again = (o[-1] for o in await asyncio.gather(
            generate("a", None), generate("b", SPEC), generate("c", SPEC)
        ))  # fmt: skip
        assert not hasattr(plain, "steering")
        logprobs = [next(iter(o.outputs[0].logprobs[0].values())).logprob for o in (plain, steered, again)]
        assert logprobs[0] != logprobs[1] == logprobs[2]
        assert steered.steering["applied"][0] | {"source": ""} == {
            "source": "", "op": "add", "layers": [0, 2], "tokens": 25, "cached": 0,
        }  # fmt: skip
        streamed = await generate("d", SPEC, RequestOutputKind.DELTA)
        assert [hasattr(output, "steering") for output in streamed] == [False] * 5 + [True]
        with pytest.raises(ValueError, match=r"steering.vectors\[0\].layers\[1\]"):
            await generate("e", {"vectors": [SPEC["vectors"][0] | {"layers": [0, 3]}]})
        # Cancelled in mid-stream: the engine goes on.
        cancelled = asyncio.create_task(generate("f", SPEC))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        assert (await generate("g", SPEC))[-1].steering["applied"][0]["tokens"] == 25
    finally:
        engine.shutdown()
