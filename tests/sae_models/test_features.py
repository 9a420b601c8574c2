"""The feature file: what goes in comes out, words find it, and nothing that is wrong with it is a traceback."""

import dataclasses
import gzip
import json
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_models.features import (
    Context,
    Evidence,
    Feature,
    FeatureStore,
    FeatureStoreError,
    Label,
    LabelError,
    TokenScore,
    create_store,
    read_labels,
    read_neuronpedia,
    suggested_strength,
)

EVIDENCE = Evidence("m/l3", "ab" * 32, "some/model", 3, 100, 12345, 40.0, ("a text (public domain)",))


def feature(index, label="", source="automatic", tokens=(), text=(), density=0.01):
    contexts = (Context(tuple(text), tuple(float(i) for i in range(len(text))), len(text) - 1, (1, 2)),) if text else ()
    scores = tuple(TokenScore(token, 1.5) for token in tokens)
    return Feature(
        index=index,
        density=density,
        max_activation=20.0,
        decoder_norm=2.0,
        quantiles=(1.0, 2.0, 3.0, 4.0, 5.0),
        raised=scores,
        lowered=(),
        informative=(),
        contexts=contexts,
        label=label,
        label_source=source,
    )


FEATURES = [
    feature(0, "words of grief and sadness", "read", [" sad", " tears"], ["She", " wept", " for", " him"]),
    feature(1, "tokens: ocean", "automatic", [" ocean", " wave"], ["the", " ocean", " at", " night"]),
    feature(2, "the sea and ships", "read", [" ship"], ["they", " sailed"]),
    feature(3, "a dead feature about the sea", "read", [" sea"], density=0.0),
    feature(4, "", "automatic", [" ship", " sea"], ["a", " sea", " of", " trouble"]),
    feature(5, "quotes \"and\" AND NOT OR NEAR(x) * ^", "read", ['"']),
]  # fmt: skip


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "features.sqlite"
    create_store(path, EVIDENCE, FEATURES)
    return FeatureStore(path, EVIDENCE.sae_sha256)


def found(store, query, limit=10):
    return [hit.feature.index for hit in store.search(query, limit)]


def test_what_goes_in_comes_out(store):
    assert list(store) == FEATURES
    assert store.get(2) == FEATURES[2]
    assert store.evidence == EVIDENCE
    with pytest.raises(KeyError):
        store.get(6)


def test_search_ranks_labels_over_tokens_over_contexts(store):
    assert found(store, "sea") == [2, 4]
    assert found(store, "sadness") == [0]
    assert found(store, "Sad") == [0], "stems meet"
    assert found(store, "oceans") == [1], "an automatic label is found by its tokens"
    assert found(store, "sea", limit=1) == [2]
    assert found(store, "weeping ocean") == [1], "any word is enough"


@pytest.mark.parametrize(
    "query", ["", "   ", '"', "*", "^", "()", "NEAR", "AND OR NOT", "a NEAR/2 b", "label:x", "-", "'; --"]
)
def test_operators_are_words(store, query):
    assert set(found(store, query)) <= {0, 1, 2, 4, 5}
    assert found(store, '"and" NEAR(x)') == [5, 0] or found(store, '"and" NEAR(x)')[0] == 5


@given(st.text(max_size=80))
@settings(max_examples=150)
def test_any_text_can_be_searched_for(tmp_path_factory, query):
    path = tmp_path_factory.getbasetemp() / "any.sqlite"
    if not path.exists():
        create_store(path, EVIDENCE, FEATURES)
    assert set(found(FeatureStore(path), query)) <= {0, 1, 2, 4, 5}


def test_labels_that_were_read_stay(store):
    labels = [
        Label(1, "the open sea", "read"),
        Label(0, "something else", "imported"),
        Label(4, "imported words", "imported"),
        Label(99, "unknown feature", "read"),
    ]
    assert store.relabel(labels) == 2
    assert store.get(1).label == "the open sea"
    assert store.get(0).label == FEATURES[0].label
    assert (store.get(4).label, store.get(4).label_source) == ("imported words", "imported")
    assert 1 in found(store, "open")
    assert store.relabel([Label(0, "grief", "read")]) == 1
    assert store.get(0).label == "grief"


def test_another_saes_file_is_refused(store):
    with pytest.raises(FeatureStoreError, match="run `steer-server sae explain` again"):
        FeatureStore(store.path, "cd" * 32)


def test_damaged_files_are_refused(tmp_path, store):
    whole = store.path.read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"this is not a database" * 100,
        "cut": whole[: len(whole) // 2],
        "header": b"SQLite format 3\0" + bytes(100),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(FeatureStoreError, match=name):
            FeatureStore(path).search("sea")
    with pytest.raises(FeatureStoreError, match="no such file"):
        FeatureStore(tmp_path / "absent")


def test_damage_inside_is_an_error_with_the_file_named(tmp_path, store):
    for number, statement in enumerate(
        (
            "UPDATE features SET detail = x'00'",
            "UPDATE features SET detail = 'text'",
            "DELETE FROM evidence",
            "UPDATE evidence SET json = '{}'",
            "DROP TABLE words",
            "PRAGMA user_version = 99",
        )
    ):
        path = tmp_path / f"damaged{number}.sqlite"
        path.write_bytes(store.path.read_bytes())
        with sqlite3.connect(path) as db:
            db.execute(statement)
        with pytest.raises(FeatureStoreError, match=path.name):
            FeatureStore(path).search("sea")


def test_a_folder_that_cannot_be_written_leaves_the_old_file(tmp_path, store):
    with pytest.raises(FeatureStoreError, match="cannot be written"):
        create_store(tmp_path / "absent" / "features.sqlite", EVIDENCE, FEATURES)

    def breaks():
        yield FEATURES[0]
        raise OSError("disk full")

    with pytest.raises(FeatureStoreError, match="disk full"):
        create_store(store.path, EVIDENCE, breaks())
    assert list(store) == FEATURES
    assert [p.name for p in store.path.parent.iterdir()] == ["features.sqlite"]


def test_strength_is_a_share_of_the_residual_norm():
    strength = suggested_strength(FEATURES[0], EVIDENCE)
    assert 0 < strength.low * 2.0 < strength.high * 2.0 < 40.0
    unknown = dataclasses.replace(FEATURES[0], decoder_norm=None)
    assert suggested_strength(unknown, EVIDENCE) is None
    assert suggested_strength(FEATURES[0], dataclasses.replace(EVIDENCE, mean_residual_norm=0.0)) is None


def write_lines(path, rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_label_files(tmp_path):
    path = write_lines(tmp_path / "l.jsonl", [{"index": 3, "label": " the   sea "}, "", {"index": 4, "label": "x"}])
    assert read_labels(path, 10) == [Label(3, "the sea", "read"), Label(4, "x", "read")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", r"l.jsonl:2: not JSON"),
        ("[1]", "l.jsonl:2: not an object"),
        ({"index": 10, "label": "x"}, "0 to 9, got 10"),
        ({"index": True, "label": "x"}, "got True"),
        ({"index": "3", "label": "x"}, "got '3'"),
        ({"index": 3, "label": "  "}, "label of feature 3 is empty"),
        ({"index": 3}, "label of feature 3 is empty"),
        ({"index": 1, "label": "again"}, "feature 1 is labelled twice"),
        ({"index": 3, "label": "x", "source": "guess"}, "read, imported, automatic"),
    ],
)
def test_bad_label_files(tmp_path, row, says):
    path = write_lines(tmp_path / "l.jsonl", [{"index": 1, "label": "fine"}, row])
    with pytest.raises(LabelError, match=says):
        read_labels(path, 10)


def test_neuronpedia_exports(tmp_path):
    """Rows with the fields that the exports have, of both kinds."""
    explanations = write_lines(
        tmp_path / "batch-0.jsonl.gz",
        [
            {
                "id": "clx1", "modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "7",
                "description": "references to oceans", "typeName": "oai_token-act-pair",
                "explanationModelName": "gpt-4o-mini", "authorId": "cl1", "createdAt": "2024-09-01T00:00:00.000Z",
            },
            {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "7", "description": "a later one"},
        ],
    )  # fmt: skip
    rows = write_lines(
        tmp_path / "batch-1.jsonl",
        [
            {
                "modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "7", "maxActApprox": 55.5,
                "frac_nonzero": 0.002, "pos_str": [" sea", " ocean"], "pos_values": [1.2, 1.1],
                "neg_str": [" desk"], "neg_values": [-0.9], "vector": [], "hasVector": False,
            },
            {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "8", "maxActApprox": 0,
             "frac_nonzero": 0},
        ],
    )  # fmt: skip
    features = read_neuronpedia([rows, explanations], 10)
    assert features[7].label == "references to oceans"
    assert features[7].label_source == "imported"
    assert features[7].raised == (TokenScore(" sea", 1.2), TokenScore(" ocean", 1.1))
    assert (features[7].max_activation, features[7].density) == (55.5, 0.002)
    assert features[8].density == 0
    path = tmp_path / "features.sqlite"
    create_store(path, EVIDENCE, features.values())
    assert found(FeatureStore(path), "oceans") == [7]
    assert FeatureStore(path).get(7) == features[7]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"index": "12", "description": "x"}, "0 to 9, got '12'"),
        ({"index": "-1", "description": "x"}, "got '-1'"),
        ({"index": "1"}, "neither an explanation"),
        ({"index": "1", "maxActApprox": "much"}, "maxActApprox must be a number"),
        ({"index": "1", "maxActApprox": 1, "pos_str": ["a"], "pos_values": []}, "lists of one length"),
        ({"index": "1", "maxActApprox": 1, "pos_str": ["a"], "pos_values": ["b"]}, "pos_values"),
        ({"index": "1", "description": None}, "is empty"),
    ],
)
def test_bad_exports(tmp_path, row, says):
    path = write_lines(tmp_path / "batch-0.jsonl.gz", [row])
    with pytest.raises(LabelError, match=says):
        read_neuronpedia([path], 10)


def test_an_export_that_is_not_gzip(tmp_path):
    path = tmp_path / "batch-0.jsonl.gz"
    path.write_bytes(b"plain")
    with pytest.raises(LabelError, match="cannot be read"):
        read_neuronpedia([path], 10)
    path.write_bytes(gzip.compress(b'{"index": "1", "description": "x"}\n' * 1000)[:-20])
    with pytest.raises(LabelError, match="cannot be read"):
        read_neuronpedia([path], 10)
