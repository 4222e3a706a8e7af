"""Slots of the bank, added up to what each row of a pass is conditioned by."""

import pytest
import torch

from core.diffusion.bank import BASE_SLOT, NULL_LABEL, AdapterBank
from core.diffusion.base import Base
from core.sampling.conditioning import Conditioning
from core.sampling.row import Term
from tests.diffusion.tiny import make_adapter

PLAIN = [Term(BASE_SLOT, 2, 1.0, 1.0)]
ONE = [Term(1, 0, 0.5, 1.0)]
MIX = [Term(1, 1, 0.5, 0.25), Term(2, NULL_LABEL, 1.5, 0.75)]


@pytest.fixture
def bank(base: Base) -> AdapterBank:
    bank = AdapterBank(base.layout(), base, slots=3)
    bank.load(1, make_adapter(base, classes=2, seed=1))
    bank.load(2, make_adapter(base, classes=3, seed=2))
    return bank


def test_each_row_is_the_sum_of_its_own_terms(bank: AdapterBank):
    theta, c_rows = Conditioning(bank).of([MIX, PLAIN, ONE])
    assert theta is not None
    one, two = bank.theta[1], bank.theta[2]
    torch.testing.assert_close(theta, torch.stack([0.5 * one + 1.5 * two, 0 * one, 0.5 * one]))
    alone = [
        bank.class_rows(*(torch.tensor(column) for column in zip(*branch, strict=True))) for branch in (MIX, PLAIN, ONE)
    ]
    torch.testing.assert_close(c_rows, torch.stack([rows.sum(0) for rows in alone]))


def test_rows_of_the_base_alone_need_no_vectors(base: Base, bank: AdapterBank):
    theta, c_rows = Conditioning(bank).of([PLAIN, PLAIN])
    assert theta is None
    assert torch.equal(c_rows, base.class_table[[2, 2]])


@pytest.mark.parametrize(("rows", "padded"), [(1, 2), (2, 2), (3, 4), (5, 5)])
def test_a_pass_is_filled_up_to_the_next_bucket(bank: AdapterBank, rows: int, padded: int):
    theta, c_rows = Conditioning(bank, buckets=(4, 2)).of([ONE] * rows)
    plain_theta, plain_rows = Conditioning(bank).of([ONE] * rows)
    assert theta is not None
    assert plain_theta is not None
    assert len(theta) == len(c_rows) == padded
    assert torch.equal(theta[:rows], plain_theta)
    assert torch.equal(c_rows[:rows], plain_rows)


def test_what_goes_on_is_kept_until_a_slot_changes(base: Base, bank: AdapterBank):
    conditioning = Conditioning(bank)
    first = conditioning.of([ONE, MIX])
    assert conditioning.of([list(ONE), list(MIX)])[1] is first[1]
    bank.load(1, make_adapter(base, classes=2, seed=3))
    after = conditioning.of([ONE, MIX])
    assert not torch.equal(after[1], first[1])
    assert torch.equal(after[1], Conditioning(bank).of([ONE, MIX])[1])
    assert torch.equal(conditioning.of([MIX, ONE])[1], after[1].flip(0))
