"""Real vLLM configurations: what cannot be steered exactly is refused at start-up, with what to change."""

import json

import pytest

from steer_server.engine.config import ConfigError
from steer_server.engine.vllm_compat.engine_config import steering_config
from steer_server.engine.vllm_compat.supported import refuse_unsupported
from steer_server.plugin import register
from tests.e2e.tiny_models import GPT2, LLAMA, tiny
from tests.sae_models.build import build_sae

NGRAM = {"method": "ngram", "num_speculative_tokens": 2}


@pytest.fixture(scope="module")
def create(tmp_path_factory):
    """Engine configurations of a tiny Llama; `model` for another folder."""
    register()
    from vllm.engine.arg_utils import EngineArgs

    llama = tiny(tmp_path_factory.mktemp("llama"), LLAMA)

    def create(model=None, steering=None, **options):
        settings = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True}
        if steering is not None:
            settings["additional_config"] = {"steering": steering}
        return EngineArgs(model=str(model or llama), **(settings | options)).create_engine_config()

    return create


def test_defaults(create):
    config = steering_config(create(max_num_seqs=5))
    assert (config.layers, config.d_model, config.n_layers) == ((0, 1, 2), 128, 3)
    assert (config.max_edits, config.rows, config.budget) == (32, 5 * 64, None)


def test_other_names_of_the_same_sizes(create, tmp_path):
    config = steering_config(create(model=tiny(tmp_path, GPT2)))
    assert (config.d_model, config.n_layers) == (64, 2)


def test_options_arrive_and_others_keep_their_own(create):
    vllm_config = create(additional_config={"steering": {"layers": [1]}, "other": 1})
    assert steering_config(vllm_config).layers == (1,)
    assert vllm_config.additional_config["other"] == 1
    json.dumps(vllm_config.additional_config)


def test_the_compiled_graphs_key_knows_the_sites_and_not_the_saes(create, tmp_path):
    folder = build_sae(tmp_path / "s", d_in=128, layer=1)
    elsewhere = build_sae(tmp_path / "e", d_in=128, cfg={"metadata": {"hook_name": "blocks.1.hook_attn_out"}})
    plain, with_sae, fewer_layers, another_site = (
        create(steering=steering).compute_hash()
        for steering in (
            {},
            {"saes": {"x": str(folder)}},
            {"layers": [1]},
            {"saes": {"x": str(folder), "y": str(elsewhere)}},
        )
    )
    assert plain == with_sae
    assert len({plain, fewer_layers, another_site}) == 3


def test_an_unarmed_configuration_has_another_key(create):
    armed = create()
    key = armed.compute_hash()
    armed.additional_config = {}
    assert armed.compute_hash() != key


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "external_launcher"}, "backend mp"),
        ({"pipeline_parallel_size": 2, "speculative_config": NGRAM}, "pipeline parallelism together with speculative"),
        ({"speculative_config": NGRAM | {"method": "ngram_gpu"}}, "set its method to ngram or draft_model"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "--kv-transfer-config"),
        ({"steering": {"layers": [3]}}, "decoder layers 0 to 2"),
        ({"steering": {"layer": [1]}}, "Options: layers, saes"),
    ],
)
def test_refusals(create, options, says):
    with pytest.raises(ConfigError, match=says):
        create(**options)


def test_cuda_graphs_that_cannot_be_split_at_the_op_are_refused(create):
    """As vLLM has it for some models on GPUs: no compilation, and CUDA graphs that break where vLLM says."""
    from vllm.config import CUDAGraphMode

    vllm_config = create()
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    with pytest.raises(ConfigError, match="VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        refuse_unsupported(vllm_config)


@pytest.fixture
def drafting(create):
    """A configuration with a draft model, under asynchronous scheduling, which vLLM turns off on the CPU."""
    vllm_config = create(speculative_config=NGRAM)
    vllm_config.speculative_config.method = "draft_model"
    vllm_config.scheduler_config.async_scheduling = True
    return vllm_config


def test_drafts_under_asynchronous_scheduling_are_for_the_v2_runner(drafting, monkeypatch):
    with pytest.raises(ConfigError, match=r"on the V1 model runner\. Add --no-async-scheduling"):
        refuse_unsupported(drafting)
    monkeypatch.setattr(type(drafting), "use_v2_model_runner", property(lambda self: True))
    refuse_unsupported(drafting)


def test_adaptive_verification_is_refused(drafting, monkeypatch):
    monkeypatch.setattr(type(drafting), "use_v2_model_runner", property(lambda self: True))
    drafting.speculative_config.enable_adaptive_verification = True
    with pytest.raises(ConfigError, match="Set enable_adaptive_verification to false in --speculative-config"):
        refuse_unsupported(drafting)


def test_the_rust_front_end_is_refused(create, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ConfigError, match="VLLM_USE_RUST_FRONTEND"):
        create()
