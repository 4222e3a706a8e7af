"""The base that ships: it loads by our loader and by unmodified diffusers alike, and an adapter of it is small."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.settings import PACKAGED_BASE


@pytest.fixture(scope="module")
def shipped() -> Base:
    return load_base(PACKAGED_BASE)


def test_it_says_what_it_is(shipped: Base):
    assert (shipped.name, shipped.image_size, shipped.num_classes) == ("emoji-dit-64", 64, 32)
    assert "bird" in shipped.id2label.values()
    assert shipped.vae is not None


def test_an_adapter_of_ten_classes_is_less_than_half_a_per_cent_of_it(shipped: Base):
    assert shipped.layout().parameter_count(10) == 36_880
    assert 36_880 / shipped.summary.parameters < 0.005


def test_zero_is_diffusers_own_forward_bit_for_bit(shipped: Base):
    model = DiTTransformer2DModel.from_pretrained(
        PACKAGED_BASE / "transformer", torch_dtype=torch.float32, low_cpu_mem_usage=False
    ).eval()
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([3, 500, 999]), torch.tensor([0, 31, 32])
    with torch.no_grad():
        wanted = model(x, timestep=t, class_labels=labels).sample
        rows = torch.zeros(3, shipped.layout().size)
        assert torch.equal(shipped.forward(x, t, rows, shipped.class_table[labels]), wanted)
