"""Hook points in vLLM's own model classes: what is read and written there is what Hugging Face has at that place.

Every token is a sequence of its own, so that attention returns the token's own value and no key-value cache is needed.
"""

import pytest
import torch
import transformers

from sae_models import HookPoint
from steer_kernels.apply_edits import CapturingSite, bind_sites, prepare_edits
from steer_server.engine.vllm_compat.decoder_layers import find_decoder_layers, find_places
from tests.kernels.edit_cases import build_edits
from tests.oracle.hf_sites import hook

D_MODEL, N_LAYERS, TOKENS = 64, 2, 7
SIZES = {
    "hidden_size": D_MODEL,
    "intermediate_size": 128,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
# Without `head_dim`, which is then d_model / heads.
NARROW = {name: size for name, size in SIZES.items() if name != "head_dim"} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NEOX = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
GPT2 = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": 128}
ARCHITECTURES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**NARROW),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES),
    "gemma3": transformers.Gemma3TextConfig(**SIZES),
    "olmo2": transformers.Olmo2Config(**NARROW),
    "glm4": transformers.Glm4Config(**SIZES, pad_token_id=0),
    "cohere": transformers.CohereConfig(**NARROW, pad_token_id=0),
    "exaone4": transformers.Exaone4Config(**SIZES, sliding_window=None, layer_types=["full_attention"] * N_LAYERS),
    "gpt_neox": transformers.GPTNeoXConfig(**NEOX),
    "gpt2": transformers.GPT2Config(**GPT2),
}
POINTS = [
    HookPoint(0, "resid_pre"),
    *(HookPoint(layer, kind) for layer in range(N_LAYERS) for kind in ("attn_out", "mlp_in", "mlp_out", "resid_post")),
]


class Pair:
    """The same random weights in a vLLM model, armed everywhere, and in a Hugging Face one."""

    def __init__(self, config, folder):
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

        torch.manual_seed(0)
        self.hugging_face = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in self.hugging_face.named_parameters():
                if "norm" in name or "ln_" in name or name.endswith("bias"):
                    parameter.add_(torch.rand_like(parameter) * 0.5)
                elif parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        self.hugging_face.save_pretrained(folder)
        arguments = EngineArgs(
            str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64
        )
        self.vllm_config = arguments.create_engine_config()
        with set_current_vllm_config(self.vllm_config):
            self.model = initialize_model(vllm_config=self.vllm_config)
            get_model_loader(self.vllm_config.load_config).load_weights(self.model, self.vllm_config.model_config)
            process_weights_after_loading(self.model, self.vllm_config.model_config, torch.device("cpu"))
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            layer.impl.forward = value_of_the_only_token
        layers = find_decoder_layers(self.model, N_LAYERS)
        for site, place in enumerate(find_places(layers, POINTS, D_MODEL)):
            place.arm(site)
        # Where vLLM serves Hugging Face's own class it decorates that class, which then asks this of each instance.
        self.hugging_face.base_model.do_not_compile = True
        self.ids = torch.arange(TOKENS)

    @torch.inference_mode()
    def run(self, sites):
        """What vLLM's model returns [tokens, d_model]."""
        from vllm.forward_context import set_forward_context

        bind_sites(sites)
        try:
            # Eager to the last function: Cohere's norms are compiled by vLLM whatever `enforce_eager` says.
            with (
                torch.compiler.set_stance("force_eager"),
                set_forward_context(None, self.vllm_config, num_tokens=TOKENS),
            ):
                return self.model(
                    input_ids=self.ids.to(torch.int32),
                    positions=torch.zeros(TOKENS, dtype=torch.int64),
                    intermediate_tensors=None,
                    inputs_embeds=None,
                )
        finally:
            bind_sites(())

    @torch.inference_mode()
    def run_hugging_face(self, edits):
        """The same of Hugging Face's; edits: by hook point, the function of the stream there."""
        handles = [hook(self.hugging_face, str(point), edit) for point, edit in edits.items()]
        try:
            return self.hugging_face.base_model(self.ids[:, None]).last_hidden_state[:, 0]
        finally:
            for handle in handles:
                handle.remove()


def value_of_the_only_token(layer, query, key, value, kv_cache, metadata, output=None, **rest):
    return output.copy_(value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).reshape(output.shape))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request, tmp_path_factory, process_group):
    return Pair(ARCHITECTURES[request.param], tmp_path_factory.mktemp(request.param))


def close(a, b):
    return torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


def test_streams_are_those_of_hugging_face(pair):
    sites = [CapturingSite() for _ in POINTS]
    for site in sites:
        site.tokens = TOKENS
    final = pair.run(sites)
    expected = {}
    assert close(final, pair.run_hugging_face({p: lambda h, p=p: expected.__setitem__(p, h.clone()) for p in POINTS}))
    for point, site in zip(POINTS, sites, strict=True):
        assert close(site.captured[0], expected[point]), str(point)


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_edits_do_there_what_they_do_in_hugging_face(pair, point):
    """One token has a vector added, another its component along it taken away; the rest of the model follows."""
    row = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(1))
    records = [dict(start=1, stop=2, shift=1.0), dict(start=2, stop=4, read=0, write=0, scale=0.5)]
    sites = [CapturingSite() for _ in POINTS]
    sites[POINTS.index(point)].edits = prepare_edits(build_edits(records), row)

    def edit(h):
        h = h.clone()
        h[1] += row[0]
        h[2:4] -= 0.5 * (h[2:4] @ row[0])[:, None] * row[0]
        return h

    plain, final = pair.run([]), pair.run(sites)
    assert close(final, pair.run_hugging_face({point: edit}))
    assert not close(final[1:2], plain[1:2])
    assert torch.equal(final[4:], plain[4:])
    assert torch.equal(final[0], plain[0])


def test_nothing_but_the_asked_places_is_hooked(tmp_path):
    """A server that steers layers' outputs only has the op after each layer and nowhere else."""
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES["llama"])
    layers = find_decoder_layers(model, N_LAYERS)
    for site, place in enumerate(find_places(layers, [HookPoint(0), HookPoint(1)], D_MODEL)):
        place.arm(site)
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == list(layers)
    assert all(len(layer._forward_hooks) == 1 and not layer._forward_pre_hooks for layer in layers)
