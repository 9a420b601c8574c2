"""The count of rows in use."""

import threading

import pytest

from steer_server.engine.row_budget import RowBudget
from steer_server.plan import InlineRow
from steer_server.spec import SteeringError


def rows(*names):
    return frozenset(InlineRow(name) for name in names)


def test_equal_rows_count_once_and_come_back_with_their_last_lease():
    budget = RowBudget(3)
    first, second = budget.lease(rows("a", "b"), "steering"), budget.lease(rows("b", "c"), "steering")
    assert budget.in_use == 3
    with pytest.raises(SteeringError, match="needs 1 more rows of steering memory; 3 of 3 are in use"):
        budget.lease(rows("a", "d"), "steering")
    first.release()
    first.release()
    assert budget.in_use == 2
    del second
    assert budget.in_use == 0


def test_a_lease_that_ends_while_another_is_taken_does_not_block():
    """Collecting garbage may end one at any instruction, on the thread that holds the lock."""
    budget = RowBudget(4)
    ending = []

    class Row(InlineRow):
        def __hash__(self):
            ending.clear()
            return super().__hash__()

    wanted, taken = frozenset([Row("b")]), []
    ending.append(budget.lease(rows("a"), "steering"))
    thread = threading.Thread(target=lambda: taken.append(budget.lease(wanted, "steering")), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert budget.in_use == 1
