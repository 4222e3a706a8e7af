"""The hand-written block, training and drawing, against diffusers' own blocks and autograd through them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.diffusion.families import load_base
from core.diffusion.families.dit import DiTBase
from core.diffusion.families.dit_passes import check_compiler, gelu_, gelu_and_slope
from core.diffusion.layout import GAMMA_PLACES, AdapterLayout, GammaDepth
from core.errors import Unavailable
from tests.diffusion.tiny import make_pipeline


def make_base(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> DiTBase:
    base = load_base(make_pipeline(folder, vae=False, **options), dtype=dtype)
    assert isinstance(base, DiTBase)
    return base


def gradients(base: DiTBase, layout: AdapterLayout, vector: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A forward pass's output and its loss's gradient, with another adapter in each row."""
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(rows, base.channels, base.sample_size, base.sample_size, generator=chance).to(base.dtype)
    t = torch.randint(0, 1000, (rows,), generator=chance)
    scales = torch.linspace(0.5, 1.5, rows).unsqueeze(1)
    leaf = vector.clone().requires_grad_()
    out = base.forward(x, t, leaf * scales, base.class_table[:1].expand(rows, -1), layout)
    target = torch.randn(out.shape, generator=chance)
    (out.float() - target).square().mean().backward()
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def both(base: DiTBase, layout: AdapterLayout, vector: Tensor, rows: int = 3) -> Sequence[tuple[Tensor, Tensor]]:
    """By the training blocks, then by diffusers' own."""
    assert base.network.is_quick
    quick = gradients(base, layout, vector, rows)
    with base.network.plain():
        assert not base.network.is_quick
        return quick, gradients(base, layout, vector, rows)


@pytest.mark.parametrize("depth", ["none", "half", "all"])
@pytest.mark.parametrize("learned_sigma", [False, True])
def test_output_and_gradient_equal_autograds(tmp_path: Path, depth: GammaDepth, learned_sigma: bool) -> None:
    base = make_base(tmp_path, learned_sigma=learned_sigma)
    layout = base.layout("difffit", depth, GAMMA_PLACES)
    vector = 0.1 * torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    (out, gradient), (plain_out, plain_gradient) = both(base, layout, vector)
    torch.testing.assert_close(out, plain_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-3, atol=1e-5 * float(plain_gradient.abs().max()))


def test_every_entry_has_a_gradient_of_its_own(tmp_path: Path) -> None:
    """The negative control of the comparison: with any one entry's gradient gone, it would fail."""
    base = make_base(tmp_path)
    layout = base.layout("difffit", "all", GAMMA_PLACES)
    vector = 0.1 * torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    (_, gradient), (_, plain) = both(base, layout, vector)
    for name, values in layout.split(plain).items():
        without = gradient.clone()
        layout.split(without)[name].zero_()
        if values.abs().max() > 1e-4 * plain.abs().max():
            with pytest.raises(AssertionError):
                torch.testing.assert_close(without, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


def test_a_base_in_bfloat16_has_the_gradient_within_its_precision(tmp_path: Path) -> None:
    base = make_base(tmp_path, dtype=torch.bfloat16)
    layout = base.layout()
    vector = 0.05 * torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    (_, gradient), (_, plain) = both(base, layout, vector)
    assert float((gradient - plain).norm() / plain.norm()) < 0.05


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_passes_have_the_same_gradient(tmp_path: Path, dtype: torch.dtype, within: float, rows: int) -> None:
    base = make_base(tmp_path, dtype)
    layout = base.layout("difffit", "all", GAMMA_PLACES)
    vector = 0.1 * torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    out, gradient = gradients(base, layout, vector, rows)
    with base.context.training(compiled=True):
        compiled_out, compiled_gradient = gradients(base, layout, vector, rows)
    assert not torch.equal(gradient, compiled_gradient)  # the control: it was another path
    assert float((compiled_out - out).norm() / out.norm()) < within
    assert float((compiled_gradient - gradient).norm() / gradient.norm()) < within
    assert not base.context.compiled


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler(torch.device("cpu"))

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    with pytest.raises(Unavailable, match=r"DIFFFIT_COMPILE=true.*g\+\+"):
        check_compiler(torch.device("cpu"))


def test_blocks_with_norms_of_their_own_keep_to_autograd(tmp_path: Path) -> None:
    assert not make_base(tmp_path, affine_norms=True).network.is_quick


def test_joined_weights_are_the_maps_own(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    attention = base.network.transformer.transformer_blocks[0].attn1
    parts = [getattr(attention, name).inner.weight for name in ("to_q", "to_k", "to_v")]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("learned_sigma", [False, True])
def test_drawing_equals_the_plain_forward(
    tmp_path: Path, learned_sigma: bool, dtype: torch.dtype, within: float
) -> None:
    base = make_base(tmp_path, dtype, learned_sigma=learned_sigma)
    layout = base.layout("difffit", "all", GAMMA_PLACES)
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(4, base.channels, base.sample_size, base.sample_size, generator=chance)
    given, t = x.clone(), torch.randint(0, 1000, (4,), generator=chance)
    c_rows = base.class_table[torch.tensor([0, 3, 4, 1])]
    rows = 0.1 * torch.randn(4, layout.size, generator=chance)
    rows[2] = 0
    with torch.no_grad():
        for vectors in (rows, rows[0], None):
            plain = base.forward(x, t, vectors, c_rows, layout)
            drawn = base.draw(x, t, vectors, c_rows, layout)
            assert float((drawn - plain).norm() / plain.norm()) < within
        bare, mixed = (base.draw(x, t, vectors, c_rows, layout) for vectors in (None, rows))
    assert torch.equal(mixed[2], bare[2])  # zero is the base
    assert float((mixed[0] - bare[0]).norm() / bare[0].norm()) > 5 * within  # the control: an adapter is seen
    assert torch.equal(x, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_and_its_slope_equal_torchs(dtype: torch.dtype) -> None:
    u = torch.cat([torch.linspace(-12, 12, 200_001), torch.tensor([0.0, -0.0, 60.0, -60.0, 300.0, -300.0])]).to(dtype)
    leaf = u.clone().float().requires_grad_()
    expected = F.gelu(leaf, approximate="tanh")
    expected.sum().backward()
    activated, slope = gelu_and_slope(u)
    assert leaf.grad is not None
    rtol, atol = (1e-5, 3e-6) if dtype == torch.float32 else (1e-2, 1e-2)
    torch.testing.assert_close(activated.float(), expected.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(slope.float(), leaf.grad, rtol=rtol, atol=atol)
    torch.testing.assert_close(gelu_(u.clone()).float(), expected.detach(), rtol=rtol, atol=atol)
