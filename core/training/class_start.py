"""Which of the base's class rows a new class starts from: the one that denoises its images best."""

from collections.abc import Callable

import torch
from torch import Tensor

from core.diffusion.base import Base
from core.training.randomness import generator, stratified_times

IMAGES = 8
SHORTLIST = 4
REPEATS = 4
_ROWS = 64


@torch.no_grad()
def choose_class_start(
    base: Base,
    latents: Tensor,
    labels: Tensor,
    classes: int,
    seed: int = 0,
    moved: Callable[[], None] = lambda: None,
) -> tuple[int | None, ...]:
    """For each class the base's class with the least denoising error on some of its latents (N, C, h, w).

    All of the base's classes and the mean row are tried on the same noise, then the best few again on more. None, the
    mean row, where no class beats it. `moved` is called after every pass.
    """
    return tuple(_choose(base, latents[labels == number], number, seed, moved) for number in range(classes))


def _choose(base: Base, latents: Tensor, number: int, seed: int, moved: Callable[[], None]) -> int | None:
    if not len(latents):
        return None
    mean_row = base.num_classes + 1
    candidates = torch.tensor([*range(base.num_classes), mean_row])
    for repeats in (1, REPEATS):
        chance = generator(seed, f"class-start-{repeats}", number)
        chosen = torch.randperm(len(latents), generator=chance)[:IMAGES].repeat(repeats)
        errors = _errors(base, latents[chosen], candidates, chance, moved)
        order = errors.argsort(stable=True)
        best = int(candidates[order[0]])
        candidates = torch.unique(torch.cat([candidates[order[:SHORTLIST]], torch.tensor([mean_row])]))
    return None if best == mean_row else best


def _errors(base: Base, x0: Tensor, candidates: Tensor, chance: torch.Generator, moved: Callable[[], None]) -> Tensor:
    """Mean squared error (K,) of each candidate row on latents x0 (M, C, h, w), noise and times the same for all."""
    schedule, device, rows = base.schedule, base.device, len(x0)
    eps = torch.randn(x0.shape, generator=chance).to(device)
    t = stratified_times(rows, len(schedule), chance).to(device)
    x0 = x0.to(device)
    x_t, target = schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t)
    pairs = torch.cartesian_prod(torch.arange(len(candidates)), torch.arange(rows))  # (K M, 2)
    errors = torch.zeros(len(candidates), rows, device=device)
    for part in pairs.split(_ROWS):
        which, row = part[:, 0], part[:, 1].to(device)
        c_rows = base.class_starts(candidates[which].to(device))
        out = base.forward(x_t[row], schedule.times[t[row]], None, c_rows)[:, : x0.shape[1]].float()
        errors[which.to(device), row] = (out - target[row]).square().flatten(1).mean(1)
        moved()
    return errors.mean(1).cpu()
