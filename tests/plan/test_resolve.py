"""Specs against a catalog: edit rows, errors that name the field, and fingerprints."""

import base64

import numpy as np
import pytest

from steer_server.catalog import open_catalog
from steer_server.plan import (
    DecoderRow,
    EncoderRow,
    InlineRow,
    Limits,
    Response,
    Target,
    decode_plan,
    encode_plan,
    resolve,
)
from steer_server.spec import SteeringError, parse_spec
from tests.e2e.saes import every_kind
from tests.sae_models.build import build_sae
from tests.tensors import inline

D_MODEL, LAYERS = 8, range(4)
LIMITS = Limits(max_edits=8)
CARD = {"metadata": {"hook_name": "blocks.2.hook_resid_post", "steer_server": {"skip_first": 1}}}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    root = tmp_path_factory.mktemp("saes")
    folders = [("a", build_sae(root / "a")), ("b", build_sae(root / "b", "topk", layer=2, cfg=CARD))]
    return open_catalog([(name, str(folder)) for name, folder in folders], D_MODEL, LAYERS)


def plan(catalog, body, limits=LIMITS, layers=LAYERS):
    return resolve(parse_spec(body), catalog, D_MODEL, layers, limits)


def feature(**changes):
    return {"sae": "a", "index": 3, "op": "set", "value": 2.0} | changes


def vector(values=None, **changes):
    return {"data": inline(np.arange(1, 9) if values is None else values), "layers": [0]} | changes


@pytest.mark.parametrize(
    ("op", "value", "response"),
    [
        ("set", 2.0, Response(scale=0.0, shift=2.0)),
        ("min", 2.0, Response(low=2.0)),
        ("max", 2.0, Response(high=2.0)),
        ("scale", 2.0, Response(scale=2.0)),
        ("ablate", None, Response(scale=0.0)),
    ],
)
def test_feature_ops(catalog, op, value, response):
    (edit,) = plan(catalog, {"features": [feature(op=op, value=value)]}).plan.edits
    sha = catalog.saes["a"].sha256
    assert (edit.read, edit.write) == (EncoderRow(sha, 3), DecoderRow(sha, 3))
    assert (edit.site, edit.read_site, edit.norm) == ("blocks.1.hook_resid_post", None, "none")
    assert edit.response == response
    assert edit.target == Target("all", 0)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folders = every_kind(tmp_path_factory.mktemp("kinds"), D_MODEL, 32, list(range(9)))
    return open_catalog([(name, str(folder)) for name, folder in folders.items()], D_MODEL, range(9))


def edits_of(catalog, **changes):
    resolved = plan(catalog, {"features": [feature(**changes)]}, layers=range(9))
    return resolved, [(e.site, e.read_site, e.norm, e.read is None) for e in resolved.plan.edits]


def test_edits_act_where_the_sae_reads_and_writes(kinds):
    for name, site in (
        ("resid_pre", "blocks.0.hook_resid_pre"),
        ("attn_out", "blocks.1.hook_attn_out"),
        ("mlp_out", "blocks.2.hook_mlp_out"),
        ("mlp_in", "blocks.2.mlp.hook_in"),
    ):
        resolved, edits = edits_of(kinds, sae=f"kind/{name}")
        assert edits == [(site, None, "none", False)]
        assert resolved.entries[0].layers == (int(site.split(".")[1]),)


def test_a_transcoder_reads_the_mlps_input_and_writes_its_output(kinds):
    read, written = "blocks.6.mlp.hook_in", "blocks.6.hook_mlp_out"
    assert edits_of(kinds, sae="kind/topk_transcoder")[1] == [(written, read, "none", False)]
    # Adding depends on no stream, except where what is written is scaled by the stream that would be read.
    assert edits_of(kinds, sae="kind/topk_transcoder", op="add")[1] == [(written, None, "none", True)]
    assert edits_of(kinds, sae="kind/transcoder", op="add")[1] == [
        ("blocks.5.hook_mlp_out", "blocks.5.mlp.hook_in", "layer_norm", True)
    ]
    assert edits_of(kinds, sae="kind/constant_norm", op="add")[1] == [
        ("blocks.2.hook_resid_post", None, "constant_norm", True)
    ]


def test_an_sae_on_several_layers_acts_on_each(kinds):
    resolved, edits = edits_of(kinds, sae="kind/layer_group")
    assert edits == [(f"blocks.{layer}.hook_resid_post", None, "none", False) for layer in (7, 8)]
    assert resolved.entries[0].layers == (7, 8)
    assert len(resolved.plan.row_refs()) == 2
    nine = {"features": [feature(sae="kind/layer_group", index=i) for i in range(5)]}
    with pytest.raises(SteeringError, match=r"features\[4\] brings the request to 10 edit rows"):
        plan(kinds, nine, layers=range(9))


def test_adding_to_a_feature_reads_nothing(catalog):
    (edit,) = plan(catalog, {"features": [feature(op="add")]}).plan.edits
    assert edit.read is None
    assert edit.response == Response(shift=2.0)


@pytest.mark.parametrize(
    ("fields", "response"),
    [
        ({"op": "project_out"}, Response(scale=0.0)),
        ({"op": "scale_along", "strength": 0.5}, Response(scale=0.5)),
        ({"op": "cap", "max": 4.0}, Response(high=4.0)),
        ({"op": "cap", "min": -1.0, "max": 4.0}, Response(low=-1.0, high=4.0)),
    ],
)
def test_directions_are_normalised(catalog, fields, response):
    resolved = plan(catalog, {"vectors": [vector(**fields)]}).plan
    (edit,) = resolved.edits
    assert edit.read == edit.write
    assert edit.response == response
    row = np.frombuffer(resolved.rows[edit.read.sha256], dtype=np.float32)
    values = np.arange(1, 9)
    assert np.allclose(row, values / np.linalg.norm(values), atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_added_vector_stays_as_it_is(catalog, dtype):
    values = np.array([1, -2, 0.5, 0, 3, 96, -0.125, 7])
    resolved = plan(catalog, {"vectors": [vector() | {"data": inline(values, dtype), "strength": -2.0}]}).plan
    (edit,) = resolved.edits
    assert edit.read is None
    assert edit.response == Response(shift=-2.0)
    assert np.array_equal(np.frombuffer(resolved.rows[edit.write.sha256], dtype=np.float32), values)


def test_one_row_for_all_layers_or_one_each(catalog):
    shared = plan(catalog, {"vectors": [vector(layers=[0, 2, 3])]}).plan
    assert [e.site for e in shared.edits] == [f"blocks.{layer}.hook_resid_post" for layer in (0, 2, 3)]
    assert len(shared.rows) == len(shared.row_refs()) == 1
    each = plan(catalog, {"vectors": [vector(np.eye(8)[:2], layers=[3, 0])]}).plan
    by_layer = {
        int(e.site.split(".")[1]): np.frombuffer(each.rows[e.write.sha256], dtype=np.float32) for e in each.edits
    }
    assert np.array_equal(by_layer[3], np.eye(8)[0])
    assert np.array_equal(by_layer[0], np.eye(8)[1])


def test_apply_of_an_entry_wins_field_by_field(catalog):
    body = {
        "features": [feature(), feature(index=4, apply={"phase": "prompt"}), feature(index=5, apply={"skip_first": 9})],
        "apply": {"phase": "generation", "skip_first": 2, "preserve_norm": True},
    }
    resolved = plan(catalog, body)
    assert [e.target for e in resolved.entries] == [
        Target("generation", 2),
        Target("prompt", 2),
        Target("generation", 9),
    ]
    assert resolved.plan.preserve_norm


def test_a_card_may_skip_the_first_tokens_and_the_receipt_says_so(catalog):
    resolved = plan(catalog, {"features": [feature(sae="b")]})
    assert resolved.entries[0].target == Target("all", 1)
    assert any("skips the first 1 token" in warning for warning in resolved.warnings)
    asked = plan(catalog, {"features": [feature(sae="b")], "apply": {"skip_first": 0}})
    assert asked.entries[0].target == Target("all", 0)
    assert asked.warnings == ()


def test_an_empty_spec_says_so(catalog):
    assert "nothing was steered" in plan(catalog, {}).warnings[0]


BAD = [
    ({"features": [feature(sae="nope")]}, "features[0].sae", 404, "known SAEs: a, b"),
    ({"features": [feature(index=24)]}, "features[0].index", 400, "0 to 23"),
    ({"features": [feature(), feature(op="add")]}, "features[1]", 400, "steering.features[0]"),
    (
        {"features": [feature(apply={"phase": "prompt"}), feature(apply={"phase": "all"})]},
        "features[1]",
        400,
        "on tokens where steering.features[0] does",
    ),
    ({"vectors": [vector(layers=[0, 4])]}, "vectors[0].layers[1]", 400, "armed layers: 0-3"),
    ({"vectors": [vector(np.ones(9))]}, "vectors[0].data.shape", 400, "9 wide, the model's residual stream is 8"),
    ({"vectors": [vector(np.ones((2, 8)))]}, "vectors[0].data.shape", 400, "give 1, or one for each of the 1 layers"),
    ({"vectors": [vector(np.zeros(8), op="project_out")]}, "vectors[0].data", 400, "zero row"),
    ({"vectors": [vector(np.full(8, np.nan))]}, "vectors[0].data.data", 400, "not finite"),
    ({"vectors": [vector(np.full(8, 2e6))]}, "vectors[0]", 400, "1e+06"),
    ({"vectors": [vector(np.full(8, 2e3), strength=1e4)]}, "vectors[0]", 400, "1e+06"),
    ({"features": [feature(index=i) for i in range(9)]}, "features[8]", 400, "takes 8"),
    (
        {"features": [feature(index=i) for i in range(6)], "vectors": [vector(layers=[0, 1, 2])]},
        "vectors[0]",
        400,
        "9 edit rows",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "path", "status", "says"), BAD, ids=[path for _, path, _, _ in BAD])
def test_what_cannot_be_resolved(catalog, body, path, status, says):
    with pytest.raises(SteeringError) as caught:
        plan(catalog, body)
    assert (caught.value.param, caught.value.status) == (f"steering.{path}", status)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "0 characters"),
        ("AAAA", "4 characters"),
        (base64.b64encode(bytes(28)).decode(), "32 bytes"),
        ("!" * 44, "not base64"),
        ("A" * 43 + "é", "not base64"),
        ("=" * 44, "not base64"),
    ],
)
def test_data_of_the_wrong_size_or_alphabet(catalog, data, says):
    with pytest.raises(SteeringError) as caught:
        plan(catalog, {"vectors": [vector() | {"data": {"dtype": "float32", "shape": [8], "data": data}}]})
    assert caught.value.param == "steering.vectors[0].data.data"
    assert says in caught.value.message


def test_phases_that_never_meet_may_share_a_feature(catalog):
    body = {"features": [feature(apply={"phase": "prompt"}), feature(value=5.0, apply={"phase": "generation"})]}
    assert len(plan(catalog, body).plan.edits) == 2


def test_fingerprints(catalog):
    def fingerprint(body):
        return plan(catalog, body).plan.fingerprint

    two = [feature(), feature(index=4)]
    base = fingerprint({"features": two})
    assert base.startswith("sha256:")
    assert fingerprint({"features": two[::-1]}) == base
    assert fingerprint({"features": two, "apply": {"phase": "all"}}) == base
    different = [
        {"features": two[:1]},
        {"features": [feature(value=2.5), two[1]]},
        {"features": [feature(op="min"), two[1]]},
        {"features": [feature(sae="b"), two[1]]},
        {"features": two, "apply": {"phase": "prompt"}},
        {"features": two, "apply": {"skip_first": 1}},
        {"features": two, "apply": {"preserve_norm": True}},
        {"vectors": [vector()]},
        {"vectors": [vector(np.arange(2, 10))]},
        {"vectors": [vector(layers=[1])]},
    ]
    assert len({base, *map(fingerprint, different)}) == len(different) + 1


def test_plans_survive_the_wire(catalog):
    resolved = plan(
        catalog, {"features": [feature(op="min")], "vectors": [vector(op="cap", max=1.0), vector(layers=[1, 2])]}
    )
    assert decode_plan(encode_plan(resolved.plan)) == resolved.plan


def test_layers_in_messages(catalog):
    with pytest.raises(SteeringError, match="armed layers: 1-2, 7"):
        plan(catalog, {"vectors": [vector()]}, layers=[7, 1, 2])


def test_rows_are_told_apart_by_content():
    assert len({EncoderRow("x", 1), DecoderRow("x", 1), InlineRow("x")}) == 3
