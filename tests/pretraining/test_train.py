"""The trainer on a tiny transformer: it starts at zero, resumes, and exports equal copies."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0

from pretraining.dit import CONFIG, drop_labels, make_dit, make_scheduler, tie, untied
from pretraining.export import check, copies_are_equal, write_pipeline, write_progress
from pretraining.latents import Latents
from pretraining.sample import draw_latents
from pretraining.train import Recipe, averaged, fit, noised, resume, save, start
from pretraining.vae import make_vae

TINY: dict[str, Any] = {**CONFIG, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
RECIPE = Recipe(batch=4, warmup_steps=2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_latents(rows: int = 8) -> Latents:
    labels = torch.arange(rows) % 32
    return Latents(torch.randn(rows, 4, 16, 16), torch.full((rows, 4, 16, 16), 0.1), labels, torch.ones(rows))


def weights(dit: DiTTransformer2DModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in dit.state_dict().items()}


def test_a_fresh_transformer_draws_zero() -> None:
    dit = make_dit(TINY)
    v = dit(torch.randn(2, 4, 16, 16), timestep=torch.tensor([3, 900]), class_labels=torch.tensor([0, 32])).sample
    assert torch.equal(v, torch.zeros(2, 4, 16, 16))


def test_a_tied_transformer_in_training_drops_no_label_of_its_own() -> None:
    dit = make_dit(TINY).train()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, labels = torch.randn(64, 4, 16, 16), torch.full((64,), 500), torch.zeros(64, dtype=torch.long)
    assert torch.equal(dit(x, timestep=t, class_labels=labels).sample, dit(x, timestep=t, class_labels=labels).sample)


def test_dropped_labels_become_the_null_class() -> None:
    assert drop_labels(torch.zeros(5, dtype=torch.long), share=1.0).tolist() == [32] * 5
    assert drop_labels(torch.zeros(5, dtype=torch.long), share=0.0).tolist() == [0] * 5


def test_plain_attention_computes_what_the_fused_one_does() -> None:
    dit = make_dit(TINY).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = {"timestep": torch.tensor([3, 900]), "class_labels": torch.tensor([0, 32])}
    x = torch.randn(2, 4, 16, 16)
    plain = dit(x, **inputs).sample
    for block in dit.transformer_blocks:
        block.attn1.set_processor(AttnProcessor2_0())
    torch.testing.assert_close(plain, dit(x, **inputs).sample)


def test_the_velocity_gives_back_picture_and_noise() -> None:
    scheduler, x, noise, t = (
        make_scheduler(),
        torch.randn(3, 4, 16, 16),
        torch.randn(3, 4, 16, 16),
        torch.arange(3) * 400,
    )
    x_t, v = noised(x, noise, t, scheduler)
    share = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(share.sqrt() * x_t - (1 - share).sqrt() * v, x)
    torch.testing.assert_close((1 - share).sqrt() * x_t + share.sqrt() * v, noise)


def test_exported_embedder_copies_are_bit_equal_and_survive_diffusers(tmp_path: Path) -> None:
    run = start(RECIPE, make_dit(TINY))
    list(islice(fit(run, make_latents(), lambda: 1.0), 2))
    write_pipeline(averaged(run), make_vae(), tmp_path)
    check(tmp_path)
    shipped = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer", dtype=torch.float16)
    assert copies_are_equal(shipped)
    for name, value in untied(averaged(run)).state_dict().items():
        assert torch.equal(shipped.state_dict()[name], value)
    assert DiTPipeline.from_pretrained(tmp_path).labels["face"] == 0


def test_a_run_goes_on_from_the_exported_weights_alone(tmp_path: Path) -> None:
    run = start(RECIPE, make_dit(TINY))
    list(islice(fit(run, make_latents(), lambda: 1.0), 2))
    write_pipeline(averaged(run), make_vae(), tmp_path)
    write_progress(run, tmp_path)

    again = resume(RECIPE, tmp_path / "no-state.pt", tmp_path)
    for name, value in untied(averaged(run)).state_dict().items():
        assert torch.equal(again.dit.state_dict()[name].half(), value)
    before = weights(again.dit)
    list(islice(fit(again, make_latents(), lambda: 1.0), 2))
    assert (again.step, again.since_start, copies_are_equal(again.dit)) == (4, 2, True)
    assert not torch.equal(before["proj_out_2.weight"], again.dit.state_dict()["proj_out_2.weight"])


def test_a_kept_run_goes_on_exactly_where_it_stopped(tmp_path: Path) -> None:
    state, latents = tmp_path / "dit.pt", make_latents()
    run = start(RECIPE, make_dit(TINY))
    list(islice(fit(run, latents, lambda: 1.0), 2))
    save(run, state)
    again = resume(RECIPE, state, tmp_path)
    for each in (run, again):
        torch.manual_seed(1)
        list(islice(fit(each, latents, lambda: 1.0), 2))
    assert (run.step, again.step) == (4, 4)
    for name, value in run.dit.state_dict().items():
        assert torch.equal(again.dit.state_dict()[name], value)
    for name, value in run.average.items():
        assert torch.equal(again.average[name], value)


def test_a_drawn_row_does_not_depend_on_its_batch() -> None:
    dit = make_dit(TINY).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    tie(dit)
    together = draw_latents(dit, make_scheduler(), torch.tensor([3, 4]), seed=7, steps=3)
    alone = draw_latents(dit, make_scheduler(), torch.tensor([3]), seed=7, steps=3)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)
