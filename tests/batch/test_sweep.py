"""Every row under every setting."""

import itertools
import json

import pytest

from steer_server.batch.identifiers import RowSet
from steer_server.batch.read_rows import read_rows
from steer_server.batch.rows import Refused, Request
from steer_server.batch.sweep import SweepError, parse_sweep, swept

STEERING = {
    "features": [{"sae": "s", "index": 1, "op": "set", "value": 2.0}],
    "vectors": [{"data": {}, "layers": [3]}, {"data": {}, "layers": [3], "op": "project_out"}],
    "presets": [{"name": "p"}],
}


def row(steering=STEERING):
    body = {"prompt": "x"} | ({} if steering is None else {"steering": steering})
    return Request(1, "a", "/v1/completions", json.dumps(body).encode())


def steerings(texts, steering=STEERING):
    return [json.loads(r.body)["steering"] for r in swept(row(steering), parse_sweep(texts), 1)]


def test_values():
    sweep = parse_sweep(["a=0,0.5,-1e3", "b.0.c=x,true,null", 'd=[[1,2],{"e":1}]', "f=nan"])
    assert sweep.as_json() == {
        "a": [0, 0.5, -1000.0],
        "b.0.c": ["x", True, None],
        "d": [[1, 2], {"e": 1}],
        "f": ["nan"],
    }


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["strength"], "is not PATH=VALUE"),
        (["=1"], "is not PATH=VALUE"),
        (["a="], "is not PATH=VALUE"),
        (["a..b=1"], "is not PATH=VALUE"),
        (["a=1", "a=2"], "swept twice"),
        (["a=1,2,1"], "a value twice"),
        (["a=" + ",".join(map(str, range(400))), "b=" + ",".join(map(str, range(400)))], "160000 combinations"),
        (["a=[]"], "0 combinations"),
    ],
)
def test_sweeps_that_cannot_be_read(texts, says):
    with pytest.raises(SweepError, match=says):
        parse_sweep(texts)


def test_every_combination_once():
    rows = swept(row(), parse_sweep(["strength=0,0.5,1", "features.0.index=12,77"]), 7)
    assert [r.number for r in rows] == list(range(7, 13))
    found = [json.loads(r.body)["steering"] for r in rows]
    expected = list(itertools.product([0, 0.5, 1], [12, 77]))
    assert [(s["vectors"][0]["strength"], s["features"][0]["index"]) for s in found] == expected
    assert [r.custom_id for r in rows] == [f"a|strength={s}|features.0.index={i}" for s, i in expected]


def test_strength_is_that_of_whatever_has_one():
    (changed,) = steerings(["strength=2"])
    assert changed == STEERING | {
        "vectors": [STEERING["vectors"][0] | {"strength": 2}, STEERING["vectors"][1]],
        "presets": [{"name": "p", "strength": 2}],
    }


def test_what_is_missing_is_made():
    texts = ["features.0.sae=s", "features.0.index=3,4", "features.0.value=5", "apply.phase=prompt"]
    assert steerings(texts, None) == [
        {"features": [{"sae": "s", "index": index, "value": 5}], "apply": {"phase": "prompt"}} for index in (3, 4)
    ]


@pytest.mark.parametrize(
    ("text", "steering", "says"),
    [
        ("strength=1", {"features": [{}]}, "no preset and no vector with a strength"),
        ("features.2.index=1", STEERING, "'2' is not one of them, nor the next"),
        ("features.x=1", STEERING, "'x' is not one of them"),
        ("features.0.index.y=1", STEERING, "holds no 'y'"),
        ("strength=1", "text", "no preset"),
        ("features.0.index=1", [1], "'features' is not one of them"),
    ],
)
def test_settings_that_a_row_cannot_have(text, steering, says):
    (refused,) = swept(row(steering), parse_sweep([text]), 1)
    assert isinstance(refused, Refused)
    assert refused.code == "invalid_sweep"
    assert says in refused.message


def test_rows_of_a_sweep_keep_their_numbers_around_bad_lines():
    lines = [b"bad", json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {}}).encode()]
    sweep = parse_sweep(["apply.skip_first=1,2,3"])
    rows = [r for group in read_rows(iter([lines]), RowSet(), sweep) for r in group]
    assert [r.number for r in rows] == [1, 4, 5, 6]
    finished = RowSet()
    for number in (1, 5):
        finished.add(number)
    again = [r for group in read_rows(iter([lines]), finished, sweep) for r in group]
    assert again == [rows[1], rows[3]]
