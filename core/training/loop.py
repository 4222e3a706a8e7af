"""The training loop as a generator: the caller saves, reports, and stops by leaving it.

A job's trainable is one vector: θ, then its class rows' differences. A pass may carry the rows of several jobs
(`advance`); each keeps its own loss, rate, clip, average, step count and guard against NaN.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from core import faults
from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.errors import Invalid
from core.training.class_start import choose_class_start
from core.training.data import TrainingData
from core.training.objective import row_losses
from core.training.path import NumericPath
from core.training.spec import TrainSpec
from core.training.trainee import Diverged, Draw, Progress, Ranks, Trainee, TrainState, layout_of


def start(base: Base, data: TrainingData, spec: TrainSpec, moved: Callable[[], None] = lambda: None) -> TrainState:
    """The state before the first step: zero, which is the base with each class at its start row.

    `moved` is called now and then: to choose the rows may take minutes.
    """
    starts: tuple[int | None, ...] = (None,) * len(data.classes)
    if spec.class_start == "best":
        starts = choose_class_start(
            base, data.mean[data.train, 0], data.labels[data.train], len(data.classes), spec.seed, moved
        )
    return TrainState.zero(layout_of(base, spec).parameter_count(len(data.classes)), starts, base.device)


def fit(
    base: Base,
    data: TrainingData,
    spec: TrainSpec,
    state: TrainState | None = None,
    path: NumericPath | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Progress]:
    """Train from `state` (default: the start) to the spec's last step, one `Progress` a step."""
    state = state if state is not None else start(base, data, spec)
    trainee = Trainee(base, data, spec, state, path, ranks)
    while state.step < spec.steps:
        [result] = advance(base, [trainee])
        if isinstance(result, Diverged):
            raise result
        yield result


def validation_loss(base: Base, data: TrainingData, spec: TrainSpec, state: TrainState) -> float | None:
    """Squared error of the averaged weights on the held-out images, at noise and times fixed by the seed.

    None where nothing is held out. Comparable over the steps of a job, and at step 0 the base's own.
    """
    return Trainee(base, data, spec, state).validate()


def finish(
    state: TrainState,
    base: Base,
    spec: TrainSpec,
    data: TrainingData,
    metrics: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter of the averaged weights, with what is to stand in its file."""
    layout = layout_of(base, spec)
    theta, table = layout.pieces(state.average.detach().cpu().clone(), len(data.classes))
    meta = {
        "base": base.name,
        "licence": base.licence,
        "image_size": spec.image_size,
        "training": spec.to_json(),
        "step": state.step,
        "metrics": dict(metrics or {}),
        "data_digest": data.digest,
    }
    return Adapter(layout, base.fingerprint, theta, table, data.classes, state.class_start, meta)


def advance(base: Base, trainees: Sequence[Trainee]) -> list[Progress | Diverged]:
    """One forward and backward pass for the next step of every trainee, all of one layout and size; each steps alone.

    On the row path, on one CPU thread, a job's bits do not depend on who shares its passes.
    """
    began = time.perf_counter()
    layout = trainees[0].layout
    if any(trainee.layout != layout for trainee in trainees):
        raise Invalid("jobs of one pass must have one layout")
    if len({trainee.data.mean.shape[2:] for trainee in trainees}) > 1:
        raise Invalid("jobs of one pass must train on one image size")
    if len(trainees) > 1 and any(trainee.path.rows == "fused" for trainee in trainees):
        raise Invalid("the fused path trains one job a pass")
    ranks = trainees[0].ranks
    if len(trainees) > 1 and any(trainee.ranks is not None for trainee in trainees):
        raise Invalid("a job on several devices is trained alone")
    if trainees[0].path.world != (1 if ranks is None else ranks.world):
        raise Invalid(f"the job's numeric path has {trainees[0].path.world} processes")
    if ranks is not None:
        ranks.begin(trainees[0].state.step)
    draws = [trainee.draw() for trainee in trainees]
    leaves = [trainee.state.vector.detach().requires_grad_() for trainee in trainees]
    sizes = [len(draw.t) for draw in draws]
    slots = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(base.device)
    x0, eps, t = (torch.cat([getattr(draw, name) for draw in draws]) for name in ("x0", "eps", "t"))
    shares = torch.cat([torch.full((size,), 1 / size) for size in sizes]).to(base.device)
    gammas = _min_snr_gammas(trainees)
    by_row = torch.zeros(len(t), device=base.device)
    for part in _parts(trainees, base.device):
        with torch.enable_grad(), _computed(base, trainees, slots[part]):
            theta, c_rows = _gather(trainees, leaves, draws, slots, part)
            x_t = base.schedule.add_noise(x0[part], eps[part], t[part])
            out = base.forward(x_t, base.schedule.times[t[part]], theta, c_rows, layout).float()
            weights = None if gammas is None else gammas[part]
            rows = row_losses(base.schedule, out, x0[part], eps[part], x_t, t[part], base.learned_sigma, weights)
            (rows * shares[part]).sum().backward()
        by_row[part] = rows.detach()
    faults.point("mid_step")
    gradients: list[Tensor] = []
    for leaf in leaves:
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    if ranks is not None:
        *gradients, by_row = ranks.sum(*gradients, by_row)
    seconds = time.perf_counter() - began
    results: list[Progress | Diverged] = []
    for number, (trainee, gradient) in enumerate(zip(trainees, gradients, strict=True)):
        results.append(trainee.update(gradient, float(by_row[slots == number].mean()), seconds))
    return results


def _computed(base: Base, trainees: Sequence[Trainee], slots: Tensor) -> AbstractContextManager[None]:
    """As the jobs' path says; their bits do not depend on each other where that is promised."""
    path = trainees[0].path
    if path.packing == "shared" or len(trainees) == 1:
        return base.context.training(compiled=path.compiled)
    return base.context.training(slots.unique_consecutive(return_counts=True)[1].tolist(), path.compiled)


def _parts(trainees: Sequence[Trainee], device: torch.device) -> list[Tensor]:
    """Row numbers of each micro-batch of this process: every job is cut where it would be cut alone."""
    own: list[tuple[Tensor, ...]] = []
    offset = 0
    for trainee in trainees:
        own.append((offset + torch.tensor(trainee.rows)).split(trainee.path.micro_batch))
        offset += trainee.spec.batch_size
    return [
        torch.cat([parts[number] for parts in own if number < len(parts)]).to(device)
        for number in range(max(len(parts) for parts in own))
    ]


def _min_snr_gammas(trainees: Sequence[Trainee]) -> Tensor | None:
    """(B,) γ of each row, infinite where its job has none; None where no job has one."""
    if all(trainee.spec.min_snr_gamma is None for trainee in trainees):
        return None
    gammas = [
        torch.full((trainee.spec.batch_size,), math.inf if (g := trainee.spec.min_snr_gamma) is None else g)
        for trainee in trainees
    ]
    return torch.cat(gammas).to(trainees[0].base.device)


def _gather(
    trainees: Sequence[Trainee],
    leaves: Sequence[Tensor],
    draws: Sequence[Draw],
    slots: Tensor,
    part: Tensor,
) -> tuple[Tensor, Tensor]:
    """The vectors (B, P), or (P,) on the fused path, and class rows (B, H) of one micro-batch."""
    pieces = [trainee.pieces(leaf) for trainee, leaf in zip(trainees, leaves, strict=True)]
    every = [
        trainee.class_rows(table, draw.labels)
        for trainee, (_, table), draw in zip(trainees, pieces, draws, strict=True)
    ]
    c_rows = (torch.cat(every) if len(every) > 1 else every[0]).index_select(0, part)
    if trainees[0].path.rows == "fused":
        return pieces[0][0], c_rows
    bank = torch.stack([theta for theta, _ in pieces])  # (J, P)
    return bank.index_select(0, slots[part]), c_rows
