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


@pytest.mark.parametrize("when", range(16))
def test_a_lease_that_ends_while_rows_are_counted(when):
    """Collecting garbage may end one at any instruction, on the thread that counts; here it shares a row with those
    that are taken and given back meanwhile."""
    budget = RowBudget(4)
    ending, hashed, kept = [], [], []

    class Row(InlineRow):
        def __hash__(self):
            if len(hashed) == when:
                ending.clear()
            hashed.append(self)
            return super().__hash__()

    def take_and_give_back():
        ending.append(budget.lease(frozenset([Row("a"), Row("b")]), "steering"))
        hashed.clear()
        kept.append(budget.lease(frozenset([Row("a")]), "steering"))
        budget.lease(frozenset([Row("a")]), "steering").release()

    thread = threading.Thread(target=take_and_give_back, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for itself"
    ending.clear()
    assert budget.in_use == 1
    kept.clear()
    assert budget.in_use == 0
