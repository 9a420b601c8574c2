"""OpenAI's lines in and out."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_server.batch.rows import (
    MAX_LINE_BYTES,
    Answer,
    Refused,
    Request,
    answered_result,
    failure_kind,
    parse_row,
    refused_result,
    row_id,
    row_number,
)
from tests.batch.stub import line

BODY = b'{ "model": "m",  "prompt":"\\u00e9", "steering": {"vectors": []}, "x": 1e0 }'


def test_the_body_is_passed_on_byte_for_byte():
    row = parse_row(3, b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body":' + BODY + b"}")
    assert row == Request(3, "a", "/v1/completions", BODY)


REFUSED = [
    (b"nonsense", None, "invalid_json", "row 7 is not JSON"),
    (b'{"custom_id": "a"', None, "invalid_json", "row 7 is not JSON"),
    (b"\xff\xfe{}", None, "invalid_json", "row 7 is not JSON"),
    (b"[1]", None, "invalid_row", "must be an object with custom_id, method, url and body"),
    (b'{"url": "/v1/completions", "body": {}}', None, "invalid_row", "custom_id is required"),
    (b'{"custom_id": 5, "url": "/v1/completions", "body": {}}', None, "invalid_row", "must be a string, got int"),
    (b'{"custom_id": "", "url": "/v1/completions", "body": {}}', None, "invalid_row", "1 to 4096 bytes"),
    (b'{"custom_id": "a", "url": "/v1/completions"}', "a", "invalid_row", "body is required"),
    (b'{"custom_id": "a", "url": "/v1/completions", "body": []}', "a", "invalid_row", "body must be an object"),
    (b'{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}', "a", "invalid_method", "'GET'"),
    (b'{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "a", "invalid_url", "/v1/chat/completions or"),
    (line("a", stream=True).encode(), "a", "not_in_a_batch", "body.stream"),
    (line("a", background=True).encode(), "a", "not_in_a_batch", "body.background"),
    (b" " * (MAX_LINE_BYTES + 1), None, "line_too_long", str(MAX_LINE_BYTES)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "custom_id", "code", "says"), REFUSED, ids=[f"{i}-{r[2]}" for i, r in enumerate(REFUSED)]
)
def test_refused_rows_say_why(text, custom_id, code, says):
    row = parse_row(7, text)
    assert isinstance(row, Refused)
    assert (row.number, row.custom_id, row.code) == (7, custom_id, code)
    assert says in row.message
    assert json.loads(refused_result("j", row).line) == {
        "id": "batch_req_j_7",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": row.message},
    }


@given(st.binary(max_size=200))
def test_no_line_breaks_the_parser(text):
    assert isinstance(parse_row(1, text), Refused | Request)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_no_value_of_a_field_breaks_the_parser(value):
    for field in ("custom_id", "method", "url", "body"):
        row = json.loads(line("a")) | {field: value}
        assert isinstance(parse_row(1, json.dumps(row).encode()), Refused | Request)


ROW = Request(2, "é", "/v1/chat/completions", b"{}")


def test_an_answer_stands_in_the_line_as_it_came():
    receipt = b'"steering":{"applied":[{"tokens":5,"cached":2},{"tokens":3,"cached":0}]}'
    body = b'{"id":"x", "usage":{"prompt_tokens":3,"completion_tokens":4},' + receipt + b"}"
    result = answered_result("j", ROW, Answer(200, body))
    assert body in result.line
    assert result.line.endswith(b"}\n")
    assert json.loads(result.line) == {
        "id": "batch_req_j_2",
        "custom_id": "é",
        "response": {"status_code": 200, "request_id": "batch_req_j_2", "body": json.loads(body)},
        "error": None,
    }
    counted = (result.failure, result.prompt_tokens, result.completion_tokens, result.steered_tokens)
    assert counted == (None, 3, 4, 7)
    conditional = body.replace(b'"cached":2', b'"cached":9,"closed":1')
    assert answered_result("j", ROW, Answer(200, conditional)).steered_tokens == 5


def test_tokens_of_the_responses_api():
    result = answered_result("j", ROW, Answer(200, b'{"usage":{"input_tokens":3,"output_tokens":4}}'))
    assert (result.prompt_tokens, result.completion_tokens) == (3, 4)


def test_an_error_of_the_server_keeps_its_body():
    body = b'{"error":{"message":"m","type":"BadRequestError","param":"steering.features[3].index","code":400}}'
    result = answered_result("j", ROW, Answer(400, body))
    assert json.loads(result.line)["response"]["status_code"] == 400
    assert json.loads(result.line)["response"]["body"] == json.loads(body)
    assert result.failure == "400 BadRequestError steering.features[].index"


@pytest.mark.parametrize(
    "body", [b"<html>\nBad gateway", b"", b"\xff", b'{\n "error":\r\n 5}', b'["a"]', b'{"usage": 7}']
)
def test_what_is_not_an_answer_still_gives_one_whole_line(body):
    line_ = answered_result("j", ROW, Answer(502, body)).line
    assert line_.count(b"\n") == 1
    assert b"\r" not in line_
    assert json.loads(line_)["response"]["status_code"] == 502


@given(st.integers(0, 10**12), st.text("0123456789abcdef", min_size=1, max_size=12))
def test_the_row_number_is_read_back(number, job):
    assert row_number(job, row_id(job, number)) == number
    assert row_number(job + "f", row_id(job, number)) is None
    assert row_number(job, "batch_req_" + job + "_") is None


def test_kinds_of_failures_do_not_count_the_numbers_in_paths():
    bodies = [msgspec.json.encode({"error": {"type": "T", "param": f"a[{i}].b[{i + 1}]"}}) for i in range(5)]
    assert {failure_kind(Answer(400, body)) for body in bodies} == {"400 T a[].b[]"}
    assert failure_kind(Answer(500, b"x")) == "500"
    assert failure_kind(Answer(401, b'{"error": "Unauthorized"}')) == "401"
