"""Drawing one picture and turning it into training rows."""

import numpy as np
import pytest
import torch

from pretraining.data import Drawing, draw
from pretraining.vae import augment, line_art, make_vae, to_unit, whiten


def test_a_drawing_is_on_white_paper() -> None:
    pytest.importorskip("resvg_py", reason="resvg-py is not installed: pip install resvg-py")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect x="2" y="2" width="4" height="4"/></svg>'
    pixels = draw(Drawing(0, "1f600", 0, svg))
    assert pixels is not None
    assert pixels.shape == (64, 64, 3)
    assert (pixels[0, 0].tolist(), pixels[32, 32].tolist()) == ([255, 255, 255], [0, 0, 0])


def test_what_cannot_be_drawn_is_left_out() -> None:
    pytest.importorskip("resvg_py", reason="resvg-py is not installed: pip install resvg-py")
    assert draw(Drawing(0, "1f600", 0, "<svg")) is None


def test_line_art_of_blank_paper_is_blank() -> None:
    art = line_art(torch.ones(2, 3, 64, 64), torch.tensor([True, False]))
    assert torch.equal(art, torch.ones(2, 3, 64, 64))


def test_augmented_rows_stay_pictures() -> None:
    torch.manual_seed(0)
    x = augment(to_unit(np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)))
    assert x.shape == (16, 3, 64, 64)
    assert float(x.abs().max()) <= 1


def test_whitening_changes_the_latents_but_not_the_pictures() -> None:
    torch.manual_seed(0)
    vae, x = make_vae().eval(), torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mode()).sample
        whiten(vae, x)
        latents = vae.encode(x).latent_dist.mode()
        after = vae.decode(latents).sample
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert latents.shape == (4, 4, 16, 16)
    assert vae.config.scaling_factor == pytest.approx(1, abs=0.05)
