"""The bank: slot 0 is the base, a slot holds its adapter and nothing of the one before."""

from dataclasses import replace

import pytest
import torch

from core.diffusion.adapter import Adapter
from core.diffusion.bank import AdapterBank
from core.diffusion.base import Base
from core.errors import Conflict, Invalid
from tests.diffusion.tiny import make_adapter

SLOTS, LABELS = torch.tensor([0, 1, 2]), torch.tensor([3, 0, -1])


def predict(base: Base, bank: AdapterBank, slots: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    x = torch.randn(len(slots), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 500, 900])[: len(slots)]
    with torch.no_grad():
        return base.forward(x, t, bank.rows(slots), bank.class_rows(slots, labels), bank.layout)


def test_slot_zero_is_the_base(base: Base):
    bank = AdapterBank(base.layout(), base, slots=3)
    assert not bank.rows(torch.tensor([0])).any()
    assert torch.equal(
        bank.class_rows(torch.zeros(5, dtype=torch.long), torch.tensor([0, 1, 2, 3, -1])), base.class_table
    )
    with pytest.raises(Invalid, match="slot 0 is the base"):
        bank.load(0, make_adapter(base))
    bank.theta[0, 3] = 1e-9
    with pytest.raises(AssertionError, match="must stay zero"):
        bank.rows(torch.tensor([0]))


def test_zero_theta_gives_the_start_rows(base: Base):
    bank = AdapterBank(base.layout(), base, slots=2)
    bank.load(1, Adapter.zero(base.layout(), base, ["a", "b"], (2, None)))
    rows = bank.class_rows(torch.tensor([1, 1, 1]), torch.tensor([0, 1, -1]))
    mean = base.class_table[:-1].mean(0)
    assert torch.equal(rows, torch.stack([base.class_table[2], mean, base.class_table[-1]]))


def test_strength_scales_the_differences_and_never_the_start_rows(base: Base):
    bank = AdapterBank(base.layout(), base, slots=3)
    adapter = make_adapter(base, class_start=(1, None, 0))
    bank.load(1, adapter)
    bank.load(2, replace(adapter, theta=adapter.theta / 4, class_delta=adapter.class_delta / 4))
    scale, one, two, labels = torch.tensor([0.25]), torch.tensor([1]), torch.tensor([2]), torch.tensor([0])
    assert torch.equal(bank.rows(one, scale), bank.rows(two))
    assert torch.equal(bank.class_rows(one, labels, scale), bank.class_rows(two, labels))
    nothing = bank.class_rows(one, labels, torch.tensor([0.0]))
    assert torch.equal(nothing[0], base.class_table[1])


def test_a_mixed_batch_equals_its_rows_run_alone(base: Base):
    bank = AdapterBank(base.layout(), base, slots=3)
    bank.load(1, make_adapter(base, seed=1))
    bank.load(2, make_adapter(base, seed=2, layout=base.layout("bitfit")))
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 500, 900])
    mixed = predict(base, bank, SLOTS, LABELS)
    for i in range(3):
        one = slice(i, i + 1)
        with torch.no_grad():
            c_rows = bank.class_rows(SLOTS[one], LABELS[one])
            alone = base.forward(x[one], t[one], bank.rows(SLOTS[one]), c_rows, bank.layout)
        torch.testing.assert_close(mixed[one], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[1], mixed[2])


def test_a_slot_keeps_nothing_of_the_adapter_before(base: Base):
    wide = base.layout(gamma_depth="all")
    reused, fresh = AdapterBank(wide, base, slots=3), AdapterBank(wide, base, slots=3)
    small = make_adapter(base, seed=3, classes=2, layout=base.layout("bitfit"))
    reused.load(1, make_adapter(base, seed=4, classes=9, layout=wide))
    reused.load(2, make_adapter(base, seed=5, classes=5))
    reused.load(1, small)
    fresh.load(1, small)
    one = torch.tensor([1, 1, 1])
    assert torch.equal(reused.theta[1], fresh.theta[1])
    assert torch.equal(
        reused.class_rows(one, torch.tensor([0, 1, -1])), fresh.class_rows(one, torch.tensor([0, 1, -1]))
    )
    for label in (2, 8, -2):
        with pytest.raises(Invalid, match="has no class"):
            reused.class_rows(torch.tensor([1]), torch.tensor([label]))
    assert torch.equal(
        reused.class_rows(torch.zeros(5, dtype=torch.long), torch.tensor([0, 1, 2, 3, -1])), base.class_table
    )


def test_a_slot_that_was_never_loaded_is_empty(base: Base):
    bank = AdapterBank(base.layout(), base, slots=2)
    assert not bank.is_loaded(1)
    assert not bank.theta[1].any()
    with pytest.raises(Invalid, match="slot 1 has no class -1"):
        bank.class_rows(torch.tensor([1]), torch.tensor([-1]))


def test_class_rows_come_and_go_without_the_table_growing(base: Base):
    bank = AdapterBank(base.layout(), base, slots=6)
    generator = torch.Generator().manual_seed(0)
    held: dict[int, Adapter] = {}
    for turn in range(200):
        slot = int(torch.randint(1, 6, (), generator=generator))
        classes = int(torch.randint(1, 12, (), generator=generator))
        held[slot] = make_adapter(base, seed=turn, classes=classes, class_start=(0,) * classes)
        bank.load(slot, held[slot])
    for slot, adapter in held.items():
        count = len(adapter.classes)
        rows = bank.class_rows(torch.full((count + 1,), slot), torch.tensor([*range(count), -1]))
        starts = torch.cat([base.class_table[:1].expand(count, -1), base.class_table[-1:]])
        assert torch.equal(rows, starts + adapter.class_delta)
    assert len(bank._delta) <= 256


def test_a_load_that_finds_no_memory_takes_no_rows(base: Base, monkeypatch: pytest.MonkeyPatch):
    unlucky, other = (AdapterBank(base.layout(), base, slots=2) for _ in range(2))
    many = Adapter.zero(base.layout(), base, [f"class {number}" for number in range(80)], (None,) * 80)

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    for _ in range(2):
        with monkeypatch.context() as full:
            full.setattr(torch, "zeros", refuse)
            with pytest.raises(torch.OutOfMemoryError):
                unlucky.load(1, many)
    assert not unlucky.is_loaded(1)
    for bank in (unlucky, other):
        bank.load(1, many)
    assert len(unlucky._delta) == len(other._delta)


def test_entries_that_nobody_uses_are_skipped_without_changing_a_bit(base: Base):
    wide = base.widest_layout()
    bank = AdapterBank(wide, base, slots=3)
    bank.load(1, make_adapter(base, seed=1, layout=base.layout("bitfit")))
    bank.load(2, make_adapter(base, seed=2))
    assert bank.in_use == set(base.layout().by_name)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t, c_rows = torch.tensor([10, 500, 900]), bank.class_rows(SLOTS, LABELS)
    with torch.no_grad():
        every = base.forward(x, t, bank.rows(SLOTS), c_rows, wide)
        used = base.forward(x, t, bank.rows(SLOTS), c_rows, wide, bank.in_use)
    assert torch.equal(every, used)
    bank.load(2, make_adapter(base, seed=3, layout=base.layout("bitfit")))
    assert bank.in_use == set(base.layout("bitfit").by_name)


def test_an_adapter_of_another_base_is_refused(base: Base, latent_base: Base):
    bank = AdapterBank(base.layout(), base, slots=2)
    with pytest.raises(Conflict) as caught:
        bank.load(1, make_adapter(latent_base))
    assert caught.value.code == "wrong_base"
    assert not bank.is_loaded(1)


def test_the_base_is_the_same_after_any_use_of_the_bank(base: Base):
    bank = AdapterBank(base.layout(), base, slots=3)
    before = predict(base, bank, torch.zeros(3, dtype=torch.long), torch.tensor([0, 1, -1]))
    weights = {name: value.clone() for name, value in base.network.state_dict().items()}
    for seed in range(5):
        bank.load(1 + seed % 2, make_adapter(base, seed=seed, classes=1 + seed))
        predict(base, bank, torch.tensor([0, 1 + seed % 2, 0]), torch.tensor([0, 0, 1]))
    assert torch.equal(predict(base, bank, torch.zeros(3, dtype=torch.long), torch.tensor([0, 1, -1])), before)
    assert all(torch.equal(value, weights[name]) for name, value in base.network.state_dict().items())
