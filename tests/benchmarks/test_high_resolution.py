"""The ratio of steps is read off the curves as it says."""

from pathlib import Path

import pytest
import torch

from benchmarks.high_resolution import positions, steps_to
from core.diffusion.families import load_base
from tests.diffusion.tiny import make_pipeline

CURVE = [(0, 1.0), (10, 0.8), (20, 0.9), (30, 0.4)]


@pytest.mark.parametrize(("wanted", "steps"), [(1.5, 0), (0.9, 5), (0.8, 10), (0.5, 28), (0.4, 30)])
def test_steps_to_a_loss_lie_on_straight_lines_between_measurements(wanted: float, steps: float) -> None:
    assert steps_to(CURVE, wanted) == pytest.approx(steps)


def test_a_loss_that_was_never_reached_is_an_error() -> None:
    with pytest.raises(ValueError, match="never"):
        steps_to(CURVE, 0.3)


def test_continued_positions_change_a_larger_picture_alone_and_are_put_back(tmp_path: Path) -> None:
    base = load_base(make_pipeline(tmp_path / "base", vae=False))
    c_row, t = base.class_table[:1], torch.tensor([500.0])

    def predicted(side: int) -> torch.Tensor:
        x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return base.forward(x, t, None, c_row)

    own, larger = predicted(8), predicted(16)
    with positions(base, "spread"):
        assert torch.equal(predicted(16), larger)
    with positions(base, "continued"):
        assert torch.equal(predicted(8), own)  # the base's own grid is a table
        assert not torch.allclose(predicted(16), larger)
    assert torch.equal(predicted(16), larger)
