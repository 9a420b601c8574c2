"""Rows are uploaded once, counted, kept while there is room, and never overwritten while in use."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from steer_server.engine.row_bank import Row, RowBank
from steer_server.plan import DecoderRow

CAPACITY = 4


def ref(i):
    return DecoderRow("sae", i)


class Bank(RuleBasedStateMachine):
    """A bank against a list of who holds what."""

    def __init__(self):
        super().__init__()
        self.bank = RowBank(CAPACITY, 3, torch.float32, torch.device("cpu"))
        self.held: list[int] = []
        self.uploads = 0

    def read(self, row):
        self.uploads += 1
        return Row(torch.full((3,), float(row.feature)), bias=row.feature, threshold=-row.feature)

    @rule(rows=st.frozensets(st.integers(0, 7), max_size=CAPACITY + 1))
    def acquire(self, rows):
        refs = {ref(i) for i in rows}
        if len({*self.held, *rows}) > CAPACITY:
            with pytest.raises(RuntimeError, match="admission should have prevented this"):
                self.bank.acquire(refs, self.read)
            return
        resident = refs & self.bank._slots.keys()
        before = self.uploads
        self.bank.acquire(refs, self.read)
        assert self.uploads == before + len(refs - resident)
        self.held.extend(rows)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        i = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.bank.release([ref(i)])

    @invariant()
    def rows_in_use_are_intact(self):
        assert len(self.bank) == len(set(self.held))
        slots = [self.bank.slot(ref(i)) for i in set(self.held)]
        assert len(set(slots)) == len(slots)
        for i in set(self.held):
            slot = self.bank.slot(ref(i))
            assert torch.equal(self.bank.rows[slot], torch.full((3,), float(i)))
            assert (self.bank.bias[slot], self.bank.threshold[slot]) == (i, -i)


TestBank = Bank.TestCase
TestBank.settings = settings(max_examples=60, stateful_step_count=40)


def test_an_idle_row_is_not_uploaded_again_until_its_place_is_taken():
    bank = RowBank(2, 3, torch.float32, torch.device("cpu"))
    uploads = []

    def read(row):
        uploads.append(row.feature)
        return Row(torch.zeros(3))

    for i in (0, 1, 0, 2, 1, 0):
        bank.acquire({ref(i)}, read)
        bank.release([ref(i)])
    # 2 evicts 1, the one idle for longest; 1 then evicts 0.
    assert uploads == [0, 1, 2, 1, 0]


def test_memory_is_what_the_tensor_takes():
    assert RowBank(10, 576, torch.bfloat16, torch.device("cpu")).nbytes == 10 * 576 * 2
