"""Pretrain the base on cached latents; may be stopped at any time.

`python -m pretraining.train --until 23:59` goes on from `.work/dit.pt` (with optimizer moments), or else from the
weights committed in `models/` with fresh moments and a rate warm-up, or else from nothing.
"""

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

from pretraining.data import WORK, load
from pretraining.dit import drop_labels, make_dit, make_scheduler, tie
from pretraining.latents import Latents, load_latents

STATE = WORK / "dit.pt"
MODEL = Path(__file__).parents[1] / "models" / "emoji-dit-64"


@dataclass(frozen=True)
class Recipe:
    """What a run may choose. Rates are peaks; `muon_rate` is for the blocks' matrices, `rate` for the rest."""

    batch: int = 64
    rate: float = 1e-3
    muon_rate: float = 2e-3
    muon: bool = True
    weight_decay: float = 0.01
    warmup_steps: int = 200
    ema: float = 0.998
    dropped_labels: float = 0.1


@dataclass
class Run:
    """All that a run changes: the trained weights, their moving average, the moments, and how far it came."""

    dit: DiTTransformer2DModel
    average: dict[str, Tensor]
    optimizers: list[torch.optim.Optimizer]
    recipe: Recipe
    step: int = 0  # over the whole life of the weights
    since_start: int = 0  # since the moments were fresh: what warm-up counts
    seconds: float = 0.0
    peaks: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """One step taken."""

    step: int
    loss: float


def make_optimizers(dit: DiTTransformer2DModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the attention and feed-forward matrices, AdamW for biases, embedders, modulation and ends."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in dit.named_parameters():
        inner = ".attn1." in name or ".ff." in name
        (matrices if recipe.muon and inner and parameter.ndim == 2 else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


def start(recipe: Recipe, dit: DiTTransformer2DModel, step: int = 0) -> Run:
    """A run with fresh moments whose average starts from the weights themselves."""
    dit.train()
    average = {name: value.detach().clone() for name, value in dit.named_parameters()}
    optimizers = make_optimizers(dit, recipe)
    return Run(dit, average, optimizers, recipe, step, peaks=[o.param_groups[0]["lr"] for o in optimizers])


def load_committed(folder: Path) -> DiTTransformer2DModel:
    """The shipped weights in float32, tied again."""
    return tie(DiTTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32))


def resume(recipe: Recipe, state: Path = STATE, model: Path = MODEL) -> Run:
    """The run as it was kept; else from the committed weights alone; else from nothing."""
    if state.exists():
        kept = torch.load(state, weights_only=True)
        run = start(recipe, make_dit(kept["config"]), kept["step"])
        run.dit.load_state_dict(kept["dit"])
        run.average = kept["average"]
        for optimizer, moments in zip(run.optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        run.since_start, run.seconds = kept["since_start"], kept["seconds"]
        return run
    if (model / "transformer").is_dir():
        told = json.loads((model / "training.json").read_text())
        run = start(recipe, load_committed(model), told["step"])
        run.seconds = told["hours"] * 3600
        return run
    return start(recipe, make_dit())


def save(run: Run, state: Path = STATE) -> None:
    """Keep everything a resumed run needs, replacing the old file in one move."""
    state.parent.mkdir(parents=True, exist_ok=True)
    fresh = state.with_suffix(".new")
    config = {key: value for key, value in run.dit.config.items() if not key.startswith("_")}
    torch.save(
        {
            "config": config,
            "dit": run.dit.state_dict(),
            "average": run.average,
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "step": run.step,
            "since_start": run.since_start,
            "seconds": run.seconds,
        },
        fresh,
    )
    fresh.replace(state)


def averaged(run: Run) -> DiTTransformer2DModel:
    """A tied copy of the model with the moving average as its weights: what ships."""
    dit = make_dit({key: value for key, value in run.dit.config.items() if not key.startswith("_")})
    for name, parameter in dit.named_parameters():
        parameter.data.copy_(run.average[name])
    return dit.eval()


def noised(x: Tensor, noise: Tensor, t: Tensor, scheduler: DDIMScheduler) -> tuple[Tensor, Tensor]:
    """x_t and the velocity v = alpha eps - sigma x (arXiv 2202.00512, appendix D), both (B, 4, 16, 16)."""
    signal_share = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    alpha, sigma = signal_share.sqrt(), (1 - signal_share).sqrt()
    return alpha * x + sigma * noise, alpha * noise - sigma * x


def draw_timesteps(rows: int) -> Tensor:
    """(B,) int64: logit-normal, a little to the noisy side where shapes are decided, one in five uniform."""
    middle = torch.sigmoid(torch.randn(rows) * 1.1 + 0.2)
    share = torch.where(torch.rand(rows) < 0.2, torch.rand(rows), middle)
    return (share * 1000).long().clamp(0, 999)


def loss_of(dit: DiTTransformer2DModel, x: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity, a scalar."""
    x_t, v = noised(x, noise, t, make_scheduler())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guess = dit(x_t, timestep=t, class_labels=labels).sample  # (B, 4, 16, 16)
    return (guess.float() - v).square().mean()


def fit(run: Run, latents: Latents, rate_at: "RateAt") -> Iterator[Progress]:
    """Train for ever, one step a turn; the caller saves, looks and stops by leaving the loop."""
    recipe = run.recipe
    named = dict(run.dit.named_parameters())
    while True:
        begun = time.monotonic()
        x, labels = latents.draw(recipe.batch)
        labels = drop_labels(labels, recipe.dropped_labels)
        loss = loss_of(run.dit, x, labels, draw_timesteps(len(x)), torch.randn_like(x))
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.dit.parameters(), 1.0)
        share = rate_at() * min(1.0, (run.since_start + 1) / recipe.warmup_steps)
        for optimizer, peak in zip(run.optimizers, run.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
        # A young average forgets faster, or it would drag the first random weights along.
        decay = min(recipe.ema, (run.step + 1) / (run.step + 10))
        torch._foreach_lerp_(list(run.average.values()), [named[n].data for n in run.average], 1 - decay)
        run.step += 1
        run.since_start += 1
        run.seconds += time.monotonic() - begun
        yield Progress(run.step, float(loss.detach()))


class RateAt:
    """The share of the peak rate as the clock runs: one, then a straight line to zero over the last minutes."""

    def __init__(self, until: datetime, cooldown_minutes: float) -> None:
        self._until = until
        self._cooldown = timedelta(minutes=cooldown_minutes)

    def __call__(self) -> float:
        left = self._until - datetime.now(UTC)
        return max(0.0, min(1.0, left / self._cooldown)) if self._cooldown else 1.0


@torch.no_grad()
def held_out_loss(dit: DiTTransformer2DModel, latents: Latents, draws: int = 4) -> float:
    """Velocity error on the held-out subjects, at spread timesteps with fixed noise: comparable over time."""
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    for _ in range(draws):
        x, labels = latents.draw(250, generator)
        t = torch.arange(len(x)) * 4
        noise = torch.randn(x.shape, generator=generator)
        losses.append(float(loss_of(dit, x, labels, t, noise)))
    return math.fsum(losses) / draws


def parse_until(clock: str) -> datetime:
    """The next time that the UTC clock shows HH:MM."""
    now = datetime.now(UTC)
    hour, minute = (int(part) for part in clock.split(":"))
    until = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return until if until > now else until + timedelta(days=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", type=parse_until, required=True, help="HH:MM UTC at which the run ends")
    parser.add_argument("--cooldown", type=float, default=25, help="minutes over which the rate falls to zero")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    parser.add_argument("--muon-rate", type=float, default=Recipe.muon_rate)
    parser.add_argument("--no-muon", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block: half a minute at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--vae", type=Path, default=None, help="default: the shipped one, or .work/vae before that")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(batch=args.batch, rate=args.rate, muon_rate=args.muon_rate, muon=not args.no_muon)
    torch.manual_seed(args.seed)
    run = resume(recipe, args.state)
    if args.compile:
        for block in run.dit.transformer_blocks:
            block.compile(dynamic=False)
    torch.manual_seed(args.seed + run.step)  # a resumed run must not see the same draws again
    shipped = MODEL / "vae"
    vae_folder = args.vae or (shipped if shipped.is_dir() else WORK / "vae")
    vae = AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float32)
    seen, unseen = load_latents(load(), vae)

    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    losses: list[float] = []
    begun = time.monotonic()
    for progress in fit(run, seen, RateAt(args.until, args.cooldown)):
        losses.append(progress.loss)
        ends = stopped or datetime.now(UTC) >= args.until
        if progress.step % 50 == 0:
            seconds = (time.monotonic() - begun) / len(losses)
            print(
                f"{datetime.now(UTC):%H:%M:%S} step {progress.step} loss {math.fsum(losses) / len(losses):.4f} "
                f"s/step {seconds:.3f} hours {run.seconds / 3600:.3f}",
                flush=True,
            )
            losses, begun = [], time.monotonic()
        if progress.step % 500 == 0 or ends:
            print(f"step {progress.step} held-out {held_out_loss(averaged(run), unseen):.4f}", flush=True)
            save(run, args.state)
        if ends:
            break


if __name__ == "__main__":
    main()
