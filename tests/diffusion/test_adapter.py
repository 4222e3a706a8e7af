import pytest
import torch

from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.errors import Invalid


def test_a_zero_adapter_counts_its_parameters_and_changes_nothing(base: Base):
    adapter = Adapter.zero(base.layout(), base, ["a", "b"])
    assert adapter.parameter_count == len(adapter.theta) + adapter.class_delta.numel()
    assert not adapter.theta.any()
    assert adapter.class_start == (None, None)


@pytest.mark.parametrize(
    ("theta", "table", "start"), [(-1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["theta", "class rows", "class_start"]
)
def test_parts_that_do_not_fit_each_other_are_refused(base: Base, theta: int, table: int, start: int):
    layout = base.layout()
    with pytest.raises(Invalid):
        Adapter(
            layout,
            base.fingerprint,
            torch.zeros(layout.size + theta),
            torch.zeros(3 + table, layout.hidden),
            ("a", "b"),
            (None,) * (2 + start),
        )
