import torch
from torch import Tensor

from core.training.randomness import stratified_times

AT_THE_END = 141_668
"""A seed whose 64th value is so near to 1 that float32 has no number between 63 + it and 64."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_there_is_one_time_from_each_equal_part() -> None:
    times = stratified_times(50, 1000, seeded(0))
    assert torch.equal(times // 20, torch.arange(50))
    assert len((times % 20).unique()) > 10


def test_no_time_lies_behind_the_last() -> None:
    drawn = torch.rand(64, generator=seeded(AT_THE_END))
    assert float(63 + drawn[-1]) == 64.0
    for shift in (1.0, 3.0):
        assert int(stratified_times(64, 1000, seeded(AT_THE_END), shift).max()) == 999


def test_a_shift_takes_values_and_not_chance() -> None:
    def after(shift: float) -> tuple[Tensor, Tensor]:
        chance = seeded(1)
        return stratified_times(8, 1000, chance, shift), torch.rand(4, generator=chance)

    (plain, rest), (shifted, other_rest) = after(1.0), after(3.0)
    assert torch.equal(rest, other_rest)
    u = plain / 1000
    torch.testing.assert_close(shifted / 1000, 3 * u / (1 + 2 * u), rtol=0, atol=0.004)
