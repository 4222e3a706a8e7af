"""The training loop as a generator: the caller saves, reports, and stops by leaving it.

A job's trainable is one vector: θ, then its class rows' differences. A pass may carry the rows of several jobs
(`advance`); each keeps its own loss, rate, clip, average, step count and guard against NaN.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.layout import AdapterLayout
from core.errors import Invalid
from core.training.class_start import choose_class_start
from core.training.data import TrainingData, batch_indices
from core.training.objective import row_losses
from core.training.optim import adam_step, average_step, rate_at
from core.training.randomness import generator
from core.training.spec import TrainSpec

VALIDATION_ROWS = 64
RowPath = Literal["row", "fused"]
Packing = Literal["exact", "shared"]


class Diverged(Invalid):
    """The loss or the gradient is no longer finite; the state is the last one that was."""

    code = "diverged"


@dataclass(eq=False)
class TrainState:
    """Everything that a job has learnt; all tensors (N,) float32 on the base's device."""

    vector: Tensor
    first: Tensor
    second: Tensor
    average: Tensor
    step: int
    class_start: tuple[int | None, ...]


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


@dataclass(frozen=True)
class NumericPath:
    """How the numbers of a job come about; fixed before step 0, since another path gives other bits."""

    torch: str
    device: str
    threads: int
    dtype: str
    rows: RowPath
    micro_batch: int
    world: int = 1  # processes that share a step's rows
    packing: Packing = "exact"
    """`exact`: who shares its passes changes no bit of the job, or nobody does; `shared`: it may."""
    compiled: bool = False  # docs/decisions/0015

    @property
    def is_steady(self) -> bool:
        """Whether a job has the same bits alone and in any company (docs/decisions/0011)."""
        return (self.device, self.threads, self.rows, self.world) == ("cpu", 1, "row", 1)

    def may_share(self, other: "NumericPath") -> bool:
        """Whether jobs of these paths may train in one pass."""
        if self.packing == other.packing == "shared" and self.world == 1:
            return replace(self, micro_batch=other.micro_batch) == other
        is_alike = (self.dtype, self.compiled) == (other.dtype, other.compiled)
        return self.is_steady and other.is_steady and is_alike

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "NumericPath":
        return cls(**data)


def numeric_path(base: Base, spec: TrainSpec, rows: RowPath = "row", compiled: bool = False) -> dict[str, Any]:
    """The path of a job on this machine, for the job's record; `compiled` where the base can."""
    device = base.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(base.device)
    dtype = str(base.dtype).removeprefix("torch.")
    threads, micro_batch = torch.get_num_threads(), math.ceil(spec.batch_size / spec.devices)
    path = NumericPath(
        torch.__version__,
        device,
        threads,
        dtype,
        rows,
        micro_batch,
        world=spec.devices,
        compiled=compiled and base.can_compile,
    )
    return path.to_json()


def start(base: Base, data: TrainingData, spec: TrainSpec, moved: Callable[[], None] = lambda: None) -> TrainState:
    """The state before the first step: zero, which is the base with each class at its start row.

    `moved` is called now and then: to choose the rows may take minutes.
    """
    layout = layout_of(base, spec)
    starts: tuple[int | None, ...] = (None,) * len(data.classes)
    if spec.class_start == "best":
        starts = choose_class_start(
            base, data.mean[data.train, 0], data.labels[data.train], len(data.classes), spec.seed, moved
        )
    zero = torch.zeros(layout.parameter_count(len(data.classes)), device=base.device)
    return TrainState(zero.clone(), zero.clone(), zero.clone(), zero.clone(), 0, starts)


def fit(
    base: Base,
    data: TrainingData,
    spec: TrainSpec,
    state: TrainState | None = None,
    path: Mapping[str, Any] | None = None,
    ranks: "Ranks | None" = None,
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
    average = state.average.detach().cpu().clone()
    meta = {
        "base": base.name,
        "licence": base.licence,
        "image_size": spec.image_size,
        "training": spec.to_json(),
        "step": state.step,
        "metrics": dict(metrics or {}),
        "data_digest": data.digest,
    }
    table = average[layout.size :].view(len(data.classes) + 1, layout.hidden)
    return Adapter(layout, base.fingerprint, average[: layout.size], table, data.classes, state.class_start, meta)


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
        path: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.base = base
        self.ranks = ranks
        self.path = NumericPath.from_json(path if path is not None else numeric_path(base, spec))
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
        """Images, posterior noise, times, ε and dropped labels of the next step.

        One time from each B-th of the schedule, u in [0, 1), then shifted to s u / (1 + (s - 1) u) (Esser et al., arXiv
        2403.03206, equation 23).
        """
        spec, data, size = self.spec, self.data, self.spec.batch_size
        chance = generator(spec.seed, "step", self.state.step)
        chosen = batch_indices(data, spec.seed, self.state.step, size)
        view = torch.zeros(size, dtype=torch.long)
        if data.mean.shape[1] > 1:
            view = torch.randint(data.mean.shape[1], (size,), generator=chance)
        mean = data.mean[chosen, view]
        x0 = mean + data.deviation[chosen, view] * torch.randn(mean.shape, generator=chance)
        eps = torch.randn(mean.shape, generator=chance)
        u = (torch.arange(size) + torch.rand(size, generator=chance)) / size
        t = (spec.time_shift * u / (1 + (spec.time_shift - 1) * u) * len(self.base.schedule)).long()
        dropped = torch.rand(size, generator=chance) < spec.label_dropout
        labels = torch.where(dropped, len(data.classes), data.labels[chosen])
        device = self.base.device
        return Draw(
            x0.to(device), eps.to(device), t.clamp(max=len(self.base.schedule) - 1).to(device), labels.to(device)
        )

    @property
    def rows(self) -> range:
        """Which rows of its batch are this process's."""
        size = self.spec.batch_size
        return range(size) if self.ranks is None else self.ranks.share(size)

    def pieces(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """θ (P,) and the class rows' differences (C + 1, H) of a whole vector."""
        theta, table = vector.split([self.layout.size, len(vector) - self.layout.size])
        return theta, table.view(len(self.data.classes) + 1, self.layout.hidden)

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
        times = ((torch.arange(rows) + torch.rand(rows, generator=chance)) / rows * len(schedule)).long()
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
