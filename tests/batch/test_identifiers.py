"""Sets in little memory behave like sets."""

from hypothesis import given
from hypothesis import strategies as st

from steer_server.batch.identifiers import IdSet, RowSet


@given(st.lists(st.text(max_size=3), max_size=300))
def test_ids(members):
    kept, expected = IdSet(), set()
    for member in members:
        assert kept.add(member) == (member not in expected)
        expected.add(member)
    assert len(kept) == len(expected)


def test_many_ids():
    kept = IdSet()
    assert all(kept.add(f"row-{i}") for i in range(50_000))
    assert not any(kept.add(f"row-{i}") for i in range(50_000))
    assert len(kept) == 50_000


@given(st.lists(st.integers(0, 5000), max_size=100))
def test_rows(numbers):
    kept = RowSet()
    for number in numbers:
        kept.add(number)
    assert len(kept) == len(set(numbers))
    assert [n for n in range(5010) if n in kept] == sorted(set(numbers))
