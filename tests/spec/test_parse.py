"""Every way to get the request wrong names the field, the value and what is allowed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_server.spec import FEATURE_OPS, SteeringError, parse_spec

FEATURE = {"sae": "demo/l1", "index": 3, "op": "set", "value": 2.0}
TENSOR = {"dtype": "float32", "shape": [4], "data": "AAAA"}
VECTOR = {"data": TENSOR, "layers": [1], "op": "add", "strength": 2.0}


CONDITION = {"feature": {"sae": "demo/l1", "index": 7}, "op": ">", "value": 0.3}


def one(feature=None, vector=None, **rest):
    return {
        **({"features": [FEATURE | feature]} if feature is not None else {}),
        **({"vectors": [VECTOR | vector]} if vector is not None else {}),
        **rest,
    }


def test_accepts_what_the_design_shows():
    spec = parse_spec(
        {
            "features": [FEATURE | {"unit": "raw"}, FEATURE | {"index": 4, "op": "ablate", "value": None}],
            "vectors": [VECTOR, VECTOR | {"op": "project_out", "strength": None}],
            "apply": {"phase": "generation", "skip_first": 1, "skip_special_tokens": False, "positions": None,
                      "window": None, "preserve_norm": True},
            "presets": [], "when": [CONDITION | {"scope": "token"}], "readout": None,
        }
    )  # fmt: skip
    assert [f.op for f in spec.features] == ["set", "ablate"]
    assert spec.apply.preserve_norm


def test_json_text_is_the_same_as_an_object():
    body = one({}, {})
    assert parse_spec(json.dumps(body)) == parse_spec(body)


BAD = [
    (one({"idnex": 1}), "features[0].idnex", "did you mean 'index'"),
    (one({"index": -1}), "features[0].index", "greater than or equal to 0"),
    (one({"index": 1.5}), "features[0].index", "integer"),
    (one({"index": True}), "features[0].index", "integer"),
    (one({"op": "clamp"}), "features[0].op", "'set'"),
    (one({"value": None}), "features[0].value", "required with op 'set'"),
    (one({"op": "ablate"}), "features[0].value", "does not go with op 'ablate'"),
    (one({"value": float("nan")}), "features[0].value", "finite"),
    (one({"value": float("inf")}), "features[0].value", "got inf"),
    (one({"value": 1e7}), "features[0].value", "1000000"),
    (one({"value": "8"}), "features[0].value", "number"),
    (one({"unit": "max_act"}), "features[0].unit", "not supported by this version"),
    (one({"unit": "furlong"}), "features[0].unit", "'raw'"),
    (one({"sae": ""}), "features[0].sae", "at least 1 character"),
    (one({"apply": {"preserve_norm": True}}), "features[0].apply.preserve_norm", "not a known key"),
    (one({"apply": {"positions": [1]}}), "features[0].apply.positions", "not supported by this version"),
    (one({}, apply={"window": [0, 4]}), "apply.window", "not supported by this version"),
    (one({}, apply={"skip_special_tokens": True}), "apply.skip_special_tokens", "not supported by this version"),
    (one({}, apply={"phase": "decode"}), "apply.phase", "'prompt'"),
    (one({}, apply={"skip_first": -1}), "apply.skip_first", "greater than or equal to 0"),
    (one(vector={"name": "honest"}), "vectors[0].name", "not supported by this version"),
    (one(vector={"data": None}), "vectors[0].data", "required"),
    (one(vector={"layers": []}), "vectors[0].layers", "at least 1 item"),
    (one(vector={"layers": [2, 2]}), "vectors[0].layers", "twice"),
    (one(vector={"layers": [-1]}), "vectors[0].layers[0]", "greater than or equal to 0"),
    (one(vector={"op": "project_out"}), "vectors[0].strength", "does not go with op 'project_out'"),
    (one(vector={"op": "scale_along", "strength": None}), "vectors[0].strength", "required"),
    (one(vector={"op": "cap", "strength": None}), "vectors[0].min", "required"),
    (one(vector={"op": "cap", "strength": None, "min": 2, "max": 1}), "vectors[0].min", "larger than max"),
    (one(vector={"min": 1.0}), "vectors[0].min", "does not go with op 'add'"),
    (one(vector={"data": TENSOR | {"dtype": "float64"}}), "vectors[0].data.dtype", "'float32'"),
    (one(vector={"data": TENSOR | {"shape": [1, 1, 4]}}), "vectors[0].data.shape", "at most 2 items"),
    (one(vector={"data": TENSOR | {"path": "/etc/passwd"}}), "vectors[0].data.path", "not a known key"),
    ({"presets": [{"name": "cheerful"}]}, "presets", "not supported by this version"),
    (one({}, when=[CONDITION | {"op": "="}]), "when[0].op", "'>'"),
    (one({}, when=[CONDITION | {"scope": "request"}]), "when[0].scope", "'token'"),
    (one({}, when=[CONDITION | {"value": float("inf")}]), "when[0].value", "got inf"),
    (one({}, when=[{"op": ">", "value": 1.0}]), "when[0].feature", "required"),
    (one({}, when=[CONDITION | {"feature": {"sae": "a", "idnex": 1}}]), "when[0].feature.idnex", "mean 'index'"),
    (one({}, when=[CONDITION | {"featur": 3}]), "when[0].featur", "did you mean 'feature'"),
    (one({}, when=CONDITION), "when", "list"),
    ({"readout": {"sae": "x"}}, "readout", "not supported by this version"),
    ({"features": {}}, "features", "list"),
    ({"features": [3]}, "features[0]", "dictionary"),
]


@pytest.mark.parametrize(("body", "path", "says"), BAD, ids=[f"{path}-{i}" for i, (_, path, _) in enumerate(BAD)])
def test_bad_input_names_the_field(body, path, says):
    with pytest.raises(SteeringError) as caught:
        parse_spec(body, "steering")
    assert caught.value.param == f"steering.{path}"
    assert caught.value.status == 400
    assert says in caught.value.message
    assert f"steering.{path}" in caught.value.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "JSON object"),
        ("{", "JSON object"),
        ("[1]", "must be an object"),
        ('{"features": [{"value": NaN}]}', "NaN"),
        ('{"apply": {}, "apply": {}}', "twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_json_text(text, says):
    with pytest.raises(SteeringError) as caught:
        parse_spec(text, "vllm_xargs.steering")
    assert caught.value.param.startswith("vllm_xargs.steering")
    assert says in caught.value.message


def test_an_error_about_a_huge_value_is_short():
    for value in ("x" * 10**6, list(range(10**6)), {str(i): 0 for i in range(10**5)}):
        with pytest.raises(SteeringError) as caught:
            parse_spec({"features": value})
        assert len(caught.value.message) < 500


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
keys = st.sampled_from(
    ["sae", "index", "op", "value", "unit", "apply", "data", "layers", "strength", "min", "max", "name"]
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "features": json_values | st.lists(st.dictionaries(keys, json_values | st.sampled_from(FEATURE_OPS))),
            "vectors": json_values | st.lists(st.dictionaries(keys, json_values)),
            "apply": json_values,
            "when": json_values,
        },
    )
    | json_values
)
def test_anything_is_a_spec_or_a_steering_error(value):
    try:
        parse_spec(value)
    except SteeringError as error:
        assert error.param.startswith("steering")
        assert error.status == 400
