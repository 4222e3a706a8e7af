"""An adapter folded into the weights draws what it draws unfolded."""

import numpy as np
import pytest
import torch

from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.diffusion.fold import fold
from core.errors import Conflict
from core.settings import PACKAGED_BASE
from tests.diffusion.tiny import make_adapter, make_pipeline


@pytest.fixture(params=[False, True], ids=["plain norms", "affine norms"])
def bases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Base]:
    folder = make_pipeline(tmp_path_factory.mktemp("fold") / "base", vae=False, affine_norms=request.param)
    return load_base(folder), load_base(folder)


def test_a_folded_adapter_equals_the_unfolded_one(bases: tuple[Base, Base]) -> None:
    base, own = bases
    layout = base.widest_layout()
    adapter = make_adapter(base, layout=layout, classes=3, class_start=(1, None, 2), strength=0.1)
    fold(own, adapter)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3.0, 300.0, 700.0, 999.0])
    starts = base.class_starts(base.start_indices(adapter.classes, adapter.class_start)) + adapter.class_delta
    labels = torch.tensor([0, 1, 2, 3])  # the last is the null row
    with torch.no_grad():
        unfolded = base.forward(x, t, adapter.theta.expand(4, -1), starts[labels], layout)
        folded = own.forward(x, t, None, own.class_table[labels])
        untouched = base.forward(x, t, None, base.class_table[labels])
    scale = float(unfolded.abs().max())
    assert float((folded - unfolded).abs().max()) <= 1e-5 * scale
    assert float((folded - untouched).abs().max()) > 1e-2 * scale  # the negative control
    assert (own.num_classes, own.id2label[2]) == (3, adapter.classes[2])
    assert np.array_equal(own.class_starts(labels), own.class_table[labels])


def test_folding_into_the_shipped_base_changes_nothing_either() -> None:
    base, own = load_base(PACKAGED_BASE), load_base(PACKAGED_BASE)
    adapter = make_adapter(base, strength=0.05)
    fold(own, adapter)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([40.0, 800.0]), torch.tensor([0, 3])
    starts = base.class_starts(base.start_indices(adapter.classes, adapter.class_start)) + adapter.class_delta
    with torch.no_grad():
        unfolded = base.forward(x, t, adapter.theta.expand(2, -1), starts[labels])
        folded = own.forward(x, t, None, own.class_table[labels])
    assert float((folded - unfolded).abs().max()) <= 1e-5 * float(unfolded.abs().max())


def test_an_adapter_of_another_base_is_not_folded(bases: tuple[Base, Base], tmp_path) -> None:
    other = load_base(make_pipeline(tmp_path / "other", vae=False, seed=1))
    with pytest.raises(Conflict, match="another base"):
        fold(bases[0], make_adapter(other))
