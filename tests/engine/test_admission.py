"""Admission, the row budget, and receipts from what workers report."""

import gc
from dataclasses import replace

import numpy as np
import pytest

from steer_server.engine.admission import Admission, NotAppliedError
from steer_server.engine.config import ConfigError, ModelFacts, SteeringConfig, parse_options, resolve_config
from steer_server.plan import CLOSED, OPEN
from steer_server.spec import SteeringError
from tests.e2e.saes import every_kind
from tests.sae_models.build import build_sae
from tests.tensors import inline

MODEL = ModelFacts(name="org/test-model", d_model=8, n_layers=4, max_num_seqs=4, max_num_batched_tokens=64, frontends=1)


def config_of(model=MODEL, **options):
    return resolve_config(parse_options(options), model)


def spec(*features, **rest):
    return {"features": [{"sae": "a", "index": i, "op": "set", "value": 1.0} for i in features], **rest}


@pytest.fixture
def sae(tmp_path):
    return {"saes": {"a": str(build_sae(tmp_path / "a"))}}


def test_defaults_hold_every_batch(sae):
    config = config_of(**sae)
    assert config.layers == (0, 1, 2, 3)
    assert config.max_edits == 32
    assert config.rows == 4 * 32 * 2
    assert config.budget is None
    many_layers = ModelFacts("m", 8, 80, 4, 64, 1)
    assert config_of(many_layers).max_edits == 80


def test_config_travels_as_json(sae):
    import json

    config = config_of(rows=70, layers=[3, 1], **sae)
    assert SteeringConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert config.layers == (1, 3)


def test_only_what_changes_the_graph_is_in_its_key(sae):
    assert config_of(**sae).graph_factors() == config_of(max_edits=3).graph_factors()
    assert config_of(layers=[1], **sae).graph_factors() != config_of(**sae).graph_factors()


def test_sites_are_the_layers_outputs_and_what_saes_need(sae, tmp_path):
    outputs = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(9))
    nine = ModelFacts("m", 8, 9, 4, 64, 1)
    assert config_of(nine, **sae).sites == config_of(nine).sites == outputs
    kinds = {name: str(folder) for name, folder in every_kind(tmp_path, 8, 32, list(range(9))).items()}
    config = config_of(nine, saes=kinds)
    assert config.layers == tuple(range(9))
    assert set(config.sites) - set(outputs) == {
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_attn_out",
        "blocks.2.hook_mlp_out",
        "blocks.2.mlp.hook_in",
        "blocks.5.mlp.hook_in",
        "blocks.5.hook_mlp_out",
        "blocks.6.mlp.hook_in",
        "blocks.6.hook_mlp_out",
    }
    assert len(set(config.sites)) == len(config.sites)
    assert config.graph_factors() != config_of(nine).graph_factors()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": [4]}, "decoder layers 0 to 3"),
        ({"layers": []}, "decoder layers 0 to 3"),
        ({"rows": 63}, "give at least 64"),
        ({"rows": 0}, "steering.rows"),
        ({"sea": {}}, "Options: layers, saes"),
        ({"saes": {"a": 3}}, "steering.saes.a"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(ConfigError, match=says):
        config_of(**options)


def test_a_budget_is_shared_by_the_front_ends():
    assert config_of(rows=128).budget == 128
    assert config_of(ModelFacts("m", 8, 4, 4, 64, frontends=2), rows=128).budget == 64


@pytest.mark.parametrize(
    ("saes", "says"),
    [
        ([("bad name", "x")], "letters, digits"),
        ([("../a", "x")], "letters, digits"),
        ([("a", "x"), ("a", "x")], "no such file or folder"),
    ],
)
def test_catalog_names(saes, says):
    from steer_server.catalog import CatalogError, open_catalog

    with pytest.raises(CatalogError, match=says):
        open_catalog(saes, 8, [0])


def test_an_sae_must_fit_the_model(tmp_path):
    from steer_server.catalog import CatalogError, open_catalog

    folder = str(build_sae(tmp_path / "a"))
    with pytest.raises(CatalogError, match="d_model=8, the model has 16"):
        open_catalog([("a", folder)], 16, [1])
    with pytest.raises(CatalogError, match="not armed; armed layers"):
        open_catalog([("a", folder)], 8, [0, 2])


@pytest.mark.parametrize("kind", ["hook_resid_mid", "attn.hook_z", "ln2.hook_normalized"])
def test_a_hook_point_that_no_engine_can_arm_is_refused_by_name(kind, tmp_path):
    from steer_server.catalog import CatalogError, open_catalog

    point = f"blocks.1.{kind}"
    folder = str(build_sae(tmp_path / "a", cfg={"metadata": {"hook_name": point}}))
    with pytest.raises(CatalogError, match=rf"acts at {point}, which cannot be armed; .* blocks.1.hook_attn_out"):
        open_catalog([("a", folder)], 8, [1])


def test_a_transcoders_two_widths_are_both_the_models(tmp_path):
    from steer_server.catalog import CatalogError, open_catalog

    folder = every_kind(tmp_path, 8, 32, list(range(9)))["kind/transcoder"]
    with pytest.raises(CatalogError, match="d_model=8, the model has 16"):
        open_catalog([("a", str(folder))], 16, range(9))


def test_too_much_at_once_is_a_429_until_something_finishes(sae):
    admission = Admission(config_of(rows=44, max_edits=20, **sae))
    first = admission.admit(spec(*range(20)))
    second = admission.admit(spec(*range(12)))
    with pytest.raises(SteeringError) as caught:
        admission.admit(spec(*range(4, 24)))
    assert (caught.value.status, caught.value.retry_after) == (429, 1)
    assert "needs 8 more rows" in caught.value.message
    assert "40 of 44" in caught.value.message
    # Equal rows are counted once: this one needs nothing new, though only 4 rows are left.
    admission.admit(spec(*range(20)))
    sequence = first.start_sequence(prompt_len=5)
    sequence.add_report([(0, 5)], [], [])
    sequence.finish(num_output_tokens=1, aborted=False)
    del second
    gc.collect()
    assert admission._budget.in_use == 0
    admission.admit(spec(*range(4, 24)))


def test_a_request_that_never_ran_gives_its_rows_back(sae):
    admission = Admission(config_of(rows=64, **sae))
    admitted = admission.admit(spec(1, 2, 3))
    assert admission._budget.in_use == 6
    del admitted
    gc.collect()
    assert admission._budget.in_use == 0


def test_inline_vectors_times_choices_are_limited(sae):
    admission = Admission(config_of(**sae))
    body = {"vectors": [{"data": inline(np.ones(8)), "layers": [0]}]}
    admission.admit(body, choices=1000)
    with pytest.raises(SteeringError, match="n=16777216"):
        admission.admit(body, choices=1 << 24)


def test_receipts_add_up_over_sequences(sae):
    admitted = Admission(config_of(**sae)).admit(spec(1, apply={"phase": "prompt"}))
    for spans, returned in (([(0, 10), (10, 12)], 3), ([(8, 10), (10, 13)], 4)):
        sequence = admitted.start_sequence(prompt_len=10)
        sequence.add_report(spans, [], [])
        sequence.finish(returned, aborted=False)
    (entry,) = admitted.receipt().applied
    assert (entry.source, entry.op, entry.layers, entry.tokens, entry.cached) == ("feature a/1", "set", (1,), 12, 8)


def when(index=7, op=">", value=0.5, sae="a", **rest):
    return [{"feature": {"sae": sae, "index": index}, "op": op, "value": value} | rest]


def test_receipts_tell_on_how_many_tokens_conditions_did_not_hold(sae):
    admitted = Admission(config_of(**sae)).admit(spec(1, when=when(), apply={"skip_first": 1}))
    for said in (bytes([OPEN] * 4), bytes([CLOSED, OPEN, CLOSED, CLOSED])):
        sequence = admitted.start_sequence(prompt_len=5)
        sequence.add_report([(2, 6)], [], [(2, said)])
        sequence.finish(num_output_tokens=2, aborted=False)
    (line,) = admitted.receipt().as_json()["applied"]
    assert (line["tokens"], line["closed"], line["cached"]) == (5, 3, 2)
    without = Admission(config_of(**sae)).admit(spec(1))
    assert "closed" not in without.receipt().as_json()["applied"][0]


def test_a_token_of_which_no_condition_was_reported_fails_the_request(sae):
    sequence = Admission(config_of(**sae)).admit(spec(1, when=when())).start_sequence(prompt_len=4)
    sequence.add_report([(0, 4)], [], [(0, bytes([OPEN, OPEN, CLOSED]))])
    with pytest.raises(NotAppliedError, match="conditions were not evaluated for 1 of the tokens"):
        sequence.finish(num_output_tokens=1, aborted=False)


def test_values_at_a_bound_are_on_the_side_that_the_op_says(sae):
    admission = Admission(config_of(**sae))
    asked = {op: admission.admit(spec(1, when=when(op=op, value=0.3))).plan.when[0] for op in (">", ">=", "<", "<=")}
    third = np.float32(0.3)
    for op, condition in asked.items():
        for f in (np.nextafter(third, np.float32(0)), third, np.nextafter(third, np.float32(1))):
            holds = (f > np.float32(condition.bound)) != condition.negated
            assert holds == {">": f > third, ">=": f >= third, "<": f < third, "<=": f <= third}[op]


@pytest.mark.parametrize(
    ("body", "path", "says"),
    [
        (spec(1, when=when(sae="b")), "when[0].feature.sae", "known SAEs: a"),
        (spec(1, when=when(index=10**6)), "when[0].feature.index", "allowed: 0 to"),
        (
            {"vectors": [{"data": inline(np.ones(8)), "layers": [0]}], "when": when()},
            "when[0].feature",
            r"read at blocks.1.hook_resid_post, but the request edits blocks.0.hook_resid_post, which comes before it",
        ),
        (spec(1, when=[*when(), *when(8)]), "when[1]", "to 3 edit rows"),
    ],
)
def test_conditions_that_cannot_be(sae, body, path, says):
    with pytest.raises(SteeringError) as caught:
        Admission(config_of(max_edits=2, **sae)).admit(body)
    assert caught.value.param == f"steering.{path}"
    assert says in caught.value.message


def test_conditions_need_one_place_and_one_stage(tmp_path):
    folder = every_kind(tmp_path, 8, 32, list(range(9)))["kind/layer_group"]
    model = ModelFacts("m", 8, 9, 4, 64, 1)
    two_places = Admission(config_of(model, saes={"a": str(folder)}))
    body = {"vectors": [{"data": inline(np.ones(8)), "layers": [8]}], "when": when()}
    with pytest.raises(
        SteeringError, match=r"'a' stands at blocks.7.hook_resid_post, blocks.8.hook_resid_post; a cond"
    ):
        two_places.admit(body)
    folder = str(build_sae(tmp_path / "one"))
    two_stages = Admission(config_of(replace(model, stages=2), saes={"a": folder}))
    with pytest.raises(
        SteeringError, match=r"when\[0\]: conditions are not supported on a server with pipeline stages"
    ):
        two_stages.admit(body)


def test_conditions_of_no_edit_are_checked_and_forgotten(sae):
    admission = Admission(config_of(**sae))
    assert admission.admit({"when": when()}).plan.when == ()
    with pytest.raises(SteeringError, match="known SAEs: a"):
        admission.admit({"when": when(sae="b")})


def test_a_sequence_that_was_not_steered_as_asked_fails(sae):
    admission = Admission(config_of(**sae))
    short = admission.admit(spec(1)).start_sequence(prompt_len=10)
    short.add_report([(0, 10)], [], [])
    with pytest.raises(NotAppliedError, match="up to token 10 of 12"):
        short.finish(num_output_tokens=3, aborted=False)
    skipped = admission.admit(spec(1)).start_sequence(prompt_len=10)
    skipped.add_report([(0, 10)], ["blocks.1.hook_resid_post"], [])
    with pytest.raises(NotAppliedError, match=r"not applied at blocks.1.hook_resid_post;"):
        skipped.finish(num_output_tokens=1, aborted=False)
    aborted = admission.admit(spec(1)).start_sequence(prompt_len=10)
    aborted.finish(num_output_tokens=0, aborted=True)


def test_admitted_steering_is_shared_by_copies_of_its_parameters(sae):
    import copy

    admitted = Admission(config_of(**sae)).admit(spec(1))
    assert copy.deepcopy({"steering": admitted})["steering"] is admitted
