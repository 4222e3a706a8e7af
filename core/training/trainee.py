"""One job in training: what it has learnt, the chance of its next step, and the step that it takes by a gradient."""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from core.diffusion.base import Base
from core.diffusion.layout import AdapterLayout
from core.errors import Invalid
from core.training.data import TrainingData, batch_indices
from core.training.machine import numeric_path
from core.training.objective import row_losses
from core.training.optim import adam_step, average_step, rate_at
from core.training.path import NumericPath
from core.training.randomness import generator, stratified_times
from core.training.spec import TrainSpec

VALIDATION_ROWS = 64


class Diverged(Invalid):
    """The loss or the gradient is no longer finite; the state is the last one that was."""

    code = "diverged"


@dataclass(eq=False)
class TrainState:
    """Everything that a job has learnt; all tensors (N,) float32 on the base's device."""

    TENSORS: ClassVar = ("vector", "first", "second", "average")

    vector: Tensor
    first: Tensor
    second: Tensor
    average: Tensor
    step: int
    class_start: tuple[int | None, ...]

    @classmethod
    def zero(cls, size: int, class_start: tuple[int | None, ...], device: torch.device) -> "TrainState":
        """Before the first step: of `size` values, each class at its start row."""
        tensors = {name: torch.zeros(size, device=device) for name in cls.TENSORS}
        return cls(**tensors, step=0, class_start=class_start)


@dataclass(frozen=True)
class Progress:
    """One finished step. `state` is the live one: copy or dump it before the next step."""

    step: int
    loss: float
    val_loss: float | None
    grad_norm: float
    learning_rate: float
    seconds: float
    state: TrainState


def layout_of(base: Base, spec: TrainSpec) -> AdapterLayout:
    """The layout that a spec asks for."""
    if spec.layout == "bitfit":
        return base.layout("bitfit")
    return base.layout(spec.layout, spec.gamma_depth, spec.gamma_places)


@dataclass(frozen=True)
class Draw:
    """The chance of one step of one job, on the base's device."""

    x0: Tensor  # (B, C, h, w)
    eps: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    labels: Tensor  # (B,) rows of the job's class table


class Ranks(Protocol):
    """The processes that share a job's rows; see `core.training.distributed`."""

    @property
    def world(self) -> int: ...

    def begin(self, step: int) -> None: ...

    def share(self, rows: int) -> range: ...

    def sum(self, *parts: Tensor) -> list[Tensor]: ...


class Trainee:
    """One job in training; with `ranks`, this process's share of it."""

    def __init__(
        self,
        base: Base,
        data: TrainingData,
        spec: TrainSpec,
        state: TrainState,
        path: NumericPath | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.base = base
        self.ranks = ranks
        self.path = path if path is not None else numeric_path(base, spec)
        self.data = data
        self.spec = spec
        self.state = state
        self.layout = layout_of(base, spec)
        self._starts = base.start_indices(data.classes, state.class_start).to(base.device)
        wanted = self.layout.parameter_count(len(data.classes))
        if len(state.vector) != wanted:
            raise Invalid(f"the state has {len(state.vector)} values, the job {wanted}")

    def may_share(self, other: "Trainee") -> bool:
        """Whether both may train in one pass."""
        is_alike = (
            self.base is other.base
            and self.layout == other.layout
            and self.data.mean.shape[2:] == other.data.mean.shape[2:]
        )
        return is_alike and self.path.may_share(other.path)

    def draw(self) -> Draw:
        """Images, posterior noise, ε, times and dropped labels of the next step."""
        spec, data, size = self.spec, self.data, self.spec.batch_size
        chance = generator(spec.seed, "step", self.state.step)
        chosen = batch_indices(data, spec.seed, self.state.step, size)
        view = torch.zeros(size, dtype=torch.long)
        if data.mean.shape[1] > 1:
            view = torch.randint(data.mean.shape[1], (size,), generator=chance)
        mean = data.mean[chosen, view]
        x0 = mean + data.deviation[chosen, view] * torch.randn(mean.shape, generator=chance)
        eps = torch.randn(mean.shape, generator=chance)
        t = stratified_times(size, len(self.base.schedule), chance, spec.time_shift)
        dropped = torch.rand(size, generator=chance) < spec.label_dropout
        labels = torch.where(dropped, len(data.classes), data.labels[chosen])
        device = self.base.device
        return Draw(x0.to(device), eps.to(device), t.to(device), labels.to(device))

    @property
    def rows(self) -> range:
        """Which rows of its batch are this process's."""
        size = self.spec.batch_size
        return range(size) if self.ranks is None else self.ranks.share(size)

    def pieces(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """θ (P,) and the class rows' differences (C + 1, H) of a whole vector."""
        return self.layout.pieces(vector, len(self.data.classes))

    def class_rows(self, table: Tensor, labels: Tensor) -> Tensor:
        return self.base.class_rows(self.base.class_starts(self._starts[labels]), table.index_select(0, labels))

    def update(self, gradient: Tensor, loss: float, seconds: float) -> "Progress | Diverged":
        """Take one step, or say that it cannot be taken and leave the state as it is."""
        spec, state = self.spec, self.state
        norm = float(gradient.norm())
        step = state.step + 1
        if not math.isfinite(loss) or not math.isfinite(norm):
            return Diverged(f"step {step}: loss {loss}, gradient norm {norm}; try a smaller learning rate")
        if norm > spec.clip_norm:
            gradient = gradient * (spec.clip_norm / norm)
        rate = rate_at(step, spec.steps, spec.learning_rate, spec.warmup_steps, spec.rate_decay)
        adam_step(state.vector, gradient, state.first, state.second, step, rate)
        average_step(state.average, state.vector, spec.ema_decay, step)
        state.step = step
        due = step % spec.validation_every == 0 or step == spec.steps
        return Progress(step, loss, self.validate() if due else None, norm, rate, seconds, state)

    @torch.no_grad()
    def validate(self) -> float | None:
        """See `validation_loss`."""
        data, device, schedule = self.data, self.base.device, self.base.schedule
        if not len(data.held_out):
            return None
        chance = generator(self.spec.seed, "validation")
        held = data.held_out[torch.randperm(len(data.held_out), generator=chance)[:VALIDATION_ROWS]]
        chosen = held.repeat(max(1, VALIDATION_ROWS // len(held)))
        rows = len(chosen)
        x0 = data.mean[chosen, 0].to(device)
        eps = torch.randn(x0.shape, generator=chance).to(device)
        times = stratified_times(rows, len(schedule), chance)
        times = times[torch.randperm(rows, generator=chance)].to(device)
        labels = data.labels[chosen].to(device)
        theta, table = self.pieces(self.state.average)
        total = 0.0
        for part in torch.arange(rows).split(self.path.micro_batch):
            x_t = schedule.add_noise(x0[part], eps[part], times[part])
            c_rows = self.class_rows(table, labels[part])
            out = self.base.forward(x_t, schedule.times[times[part]], theta, c_rows, self.layout).float()
            losses = row_losses(schedule, out, x0[part], eps[part], x_t, times[part], learned_sigma=False)
            total += float(losses.double().sum())
        return total / rows
