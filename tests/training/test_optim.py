"""The rate of each step, and what one step does to a vector."""

import pytest
import torch

from core.training.optim import adam_step, rate_at


def rates(steps: int, warmup_steps: int, decay: float) -> list[float]:
    return [rate_at(step, steps, 1.0, warmup_steps, decay) for step in range(1, steps + 1)]


def test_the_rate_goes_up_stays_and_goes_down():
    found = rates(10, 3, 0.4)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rates(10, 0, 0.0) == [1.0] * 10
    assert rates(10, 0, 1.0) == pytest.approx([(10 - step) / 10 for step in range(10)])


@pytest.mark.parametrize(("steps", "warmup_steps", "decay"), [(1, 0, 1.0), (1, 0, 0.0), (3, 2, 1.0), (2, 5, 0.7)])
def test_no_step_stands_still(steps: int, warmup_steps: int, decay: float):
    assert all(0 < rate <= 1 for rate in rates(steps, warmup_steps, decay))


def test_a_step_is_torchs_adam():
    torch.manual_seed(0)
    vector = torch.randn(50)
    parameter = torch.nn.Parameter(vector.clone())
    first, second = torch.zeros(50), torch.zeros(50)
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.0)
    for step in range(1, 6):
        gradient = torch.randn(50)
        parameter.grad = gradient.clone()
        optimizer.step()
        adam_step(vector, gradient, first, second, step, 0.01)
    torch.testing.assert_close(vector, parameter.detach())
