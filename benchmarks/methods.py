"""Ways to adapt a frozen base to a domain, on equal terms: the same pictures, noises, times and labels at each step.

DiffFit and BitFit are the service's own trainer: `difffit` has γ where the paper does, `difffit-all` there in all
blocks, `difffit-everywhere` on every map's output of all blocks. The others change a base of their own, as the named
public code does:

| method | what trains beside the class rows |
|---|---|
| full | every weight and bias |
| lora-qkv | LoRA of rank 8 on the attention's q, k and v (arXiv 2304.06648, table 1; Hu et al., arXiv 2106.09685) |
| lora-fair | LoRA of rank 8 on every linear map of the blocks, and every bias; `lora-fair-1` of rank 1 |
| modules | bottlenecks of width 8 behind attention and feed-forward (Houlsby et al., arXiv 1902.00751) |

`difffit-fixed-gates` and `bitfit-fixed-gates` leave the biases of adaLN's gates alone (`benchmarks.causes`).
"""

import dataclasses
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cells import Recipe
from benchmarks.domains import Domain, Pictures
from core.adapters import format as adapter_format
from core.diffusion.base import Base
from core.diffusion.catalog import BaseSummary
from core.diffusion.families import load_base
from core.diffusion.layout import GAMMA_PLACES, AdapterLayout
from core.diffusion.places import AdaptedAffine
from core.training.data import TrainingData, prepare
from core.training.loop import finish, fit, start
from core.training.machine import numeric_path
from core.training.objective import row_losses
from core.training.optim import average_step, rate_at
from core.training.spec import TrainSpec, resolve
from core.training.trainee import Trainee, TrainState, layout_of

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Prediction (B, C, h, w) of x (B, C, h, w) at times t (B,) for labels (B,); the label after the last class is null."""

WIDTH = 8  # of the bottlenecks
_RANKS = {"lora-qkv": 8, "lora-fair": 8, "lora-fair-1": 1}
_FIXED_GATES = "-fixed-gates"
_OURS: dict[str, dict[str, object]] = {
    "bitfit": {"layout": "bitfit"},
    "difffit": {"gamma_depth": "half"},
    "difffit-all": {"gamma_depth": "all"},
    "difffit-everywhere": {"gamma_depth": "all", "gamma_places": list(GAMMA_PLACES)},
}
_OURS |= {f"{method}{_FIXED_GATES}": _OURS[method] for method in ("bitfit", "difffit")}

ADALN_PARTS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
"""What a block's adaLN hands out, in the order of its linear map's rows (arXiv 2212.09748, section 3.2)."""
GATES = tuple(number for number, part in enumerate(ADALN_PARTS) if part.startswith("gate"))


@dataclass(frozen=True)
class Adapted:
    """A method's result on one domain: what it predicts with its averaged weights, and what it cost."""

    predict: Predict
    parameters: int
    file_bytes: int
    train_seconds: float  # of CPU time, one thread
    peak_bytes: int  # of memory while training, above what the loaded base and data took
    losses: list[float]


@dataclass(frozen=True)
class Asked:
    """How to train. Where steps or rate are None they are the service's `auto`, and with `auto`'s rate go its course
    and times, whatever the recipe."""

    method: str
    steps: int | None
    batch_size: int
    learning_rate: float | None
    seed: int
    more: Mapping[str, object] = field(default_factory=dict)  # other hyperparameters than `auto`'s
    recipe: Recipe = "paper"


def spec_of(asked: Asked, summary: BaseSummary, pictures: int, classes: int) -> TrainSpec:
    """The service's own defaults, but for what is asked."""
    given: dict[str, object] = {
        "batch_size": asked.batch_size,
        "preview_every": None,
        **_OURS.get(asked.method, {}),
    }
    if asked.steps is not None:
        given["steps"] = asked.steps
    if asked.learning_rate is not None:
        given["learning_rate"] = asked.learning_rate
        if asked.recipe == "paper":
            given |= {"rate_decay": 0.0, "time_shift": 1.0}
    return resolve({**given, **asked.more}, images=pictures, classes=classes, base=summary, seed=asked.seed)


def training_data(base: Base, domain: Domain, pictures: Pictures) -> TrainingData:
    """All of the pictures train: what is held out lies in the domain's other parts."""
    data = prepare(base, pictures.pixels, pictures.labels.tolist(), domain.classes, seed=0, flip=False)
    every = torch.arange(len(pictures))
    return dataclasses.replace(data, train=every, held_out=every[:0])


def adapt(
    folder: Path,
    base: Base,
    data: TrainingData,
    asked: Asked,
    watch: Callable[[int, Predict], None] | None = None,
    watch_every: int = 0,
) -> Adapted:
    """Train by a method. `base` stays as it is; `watch` sees the averaged weights every so many steps.

    They are drawn by `base` and in its type, whatever type the recipe trains in.
    """
    spec = spec_of(asked, base.summary, len(data.train), len(data.classes))
    dtype = torch.bfloat16 if asked.recipe == "service" else base.dtype
    if asked.method == "base":
        state = start(base, data, spec)
        return Adapted(_predictor(base, data, spec, state), 0, 0, 0.0, 0, [])
    if asked.method in _OURS:
        trained = base if dtype == base.dtype else load_base(folder, dtype=dtype, name=base.name)
        fixed = gate_biases(layout_of(base, spec)) if asked.method.endswith(_FIXED_GATES) else None
        return _ours(base, trained, data, spec, watch, watch_every, fixed)
    return _others(folder, base, data, spec, asked.method, dtype, watch, watch_every)


def null_of(base: Base) -> Predict:
    """The frozen base without a class: domain guidance's other branch."""

    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        rows = base.class_starts(torch.full_like(labels, base.num_classes))
        return base.forward(x, t, None, rows)[:, : base.channels].float()

    return predict


# --- the service's own ------------------------------------------------------------------------------------------------


def _ours(
    base: Base,
    trained: Base,
    data: TrainingData,
    spec: TrainSpec,
    watch: Callable[[int, Predict], None] | None,
    watch_every: int,
    fixed: Tensor | None,
) -> Adapted:
    """`fixed` holds the places of the vector that are to stay zero, which is the base."""
    state = start(trained, data, spec)
    path = numeric_path(trained, spec, rows="fused")
    losses: list[float] = []
    peak, seconds = Peak(), 0.0
    began = time.process_time()
    for progress in fit(trained, data, spec, state, path):
        if fixed is not None:
            state.vector[fixed] = state.average[fixed] = 0.0
        seconds += time.process_time() - began
        losses.append(progress.loss)
        if watch is not None and progress.step % watch_every == 0:
            watch(progress.step, _predictor(base, data, spec, state))
        began = time.process_time()
    adapter = finish(state, trained, spec, data)
    size = len(adapter_format.save(adapter))
    count = adapter.parameter_count - (0 if fixed is None else len(fixed))
    return Adapted(_predictor(base, data, spec, state), count, size, seconds, peak.bytes(), losses)


def gate_biases(layout: AdapterLayout) -> Tensor:
    """Where the biases of the blocks' gates lie in an adapter's vector."""
    places: list[Tensor] = []
    for entry in layout.entries:
        if entry.name.endswith(".norm1.linear.bias"):
            parts = torch.arange(entry.offset, entry.offset + entry.size).chunk(len(ADALN_PARTS))
            places += [parts[number] for number in GATES]
    return torch.cat(places)


def _predictor(base: Base, data: TrainingData, spec: TrainSpec, state: TrainState) -> Predict:
    trainee = Trainee(base, data, spec, state)
    theta, table = (piece.detach().clone() for piece in trainee.pieces(state.average))
    is_base = not bool(theta.any())

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        rows = trainee.class_rows(table, labels)
        return base.forward(x, t, None if is_base else theta, rows, trainee.layout)[:, : base.channels].float()

    return predict


# --- those that change the network ------------------------------------------------------------------------------------


class Lora(nn.Module):
    """W x + b + (α / r) B A x with α = r, as PEFT's defaults of one rank have it; B starts at zero."""

    def __init__(self, inner: nn.Linear, rank: int) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Parameter(torch.empty(rank, inner.in_features))
        self.up = nn.Parameter(torch.zeros(inner.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + F.linear(F.linear(x, self.down), self.up)


class Bottleneck(nn.Module):
    """y + U gelu(D y) behind a linear map y = W x + b; U starts at zero."""

    def __init__(self, inner: nn.Linear, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.out_features, width)
        self.up = nn.Linear(width, inner.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + self.up(F.gelu(self.down(y)))


def _others(
    folder: Path,
    frozen: Base,
    data: TrainingData,
    spec: TrainSpec,
    method: str,
    dtype: torch.dtype,
    watch: Callable[[int, Predict], None] | None,
    watch_every: int,
) -> Adapted:
    torch.manual_seed(spec.seed)
    base = load_base(folder, name=frozen.name)
    trained = _open(base, method)
    table = nn.Parameter(torch.zeros(len(data.classes) + 1, base.hidden))
    parameters = [*trained.values(), table]
    # It draws the same pictures, noises and times as DiffFit's trainer does; its own vector stays empty.
    trainee = Trainee(base, data, spec, start(base, data, spec))
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    peak, seconds = Peak(), 0.0
    for step in range(1, spec.steps + 1):
        began = time.process_time()
        draw = trainee.draw()
        x_t = base.schedule.add_noise(draw.x0, draw.eps, draw.t)
        rows = trainee.class_rows(table, draw.labels)
        # Weights and their moments stay float32: only the products are of the type.
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = base.forward(x_t, base.schedule.times[draw.t], None, rows).float()
        loss = row_losses(base.schedule, out, draw.x0, draw.eps, x_t, draw.t, base.learned_sigma).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, spec.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, spec.steps, spec.learning_rate, spec.warmup_steps, spec.rate_decay)
        optimizer.step()
        for average, parameter in zip(averages, parameters, strict=True):
            average_step(average, parameter.detach(), spec.ema_decay, step)
        trainee.state.step = step
        losses.append(float(loss.detach()))
        seconds += time.process_time() - began
        if watch is not None and step % watch_every == 0:
            watch(step, _averaged(base, trainee, parameters, averages))
    tensors = dict(zip([*trained, "class_table"], averages, strict=True))
    return Adapted(
        _averaged(base, trainee, parameters, averages),
        sum(parameter.numel() for parameter in parameters),
        len(safetensors.torch.save(tensors)),
        seconds,
        peak.bytes(),
        losses,
    )


def _averaged(base: Base, trainee: Trainee, parameters: list[nn.Parameter], averages: list[Tensor]) -> Predict:
    @torch.no_grad()
    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        kept = [parameter.data for parameter in parameters]
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.data = average
        try:
            rows = trainee.class_rows(parameters[-1], labels)
            return base.forward(x, t, None, rows)[:, : base.channels].float()
        finally:
            for parameter, data in zip(parameters, kept, strict=True):
                parameter.data = data

    return predict


def _open(base: Base, method: str) -> dict[str, nn.Parameter]:
    """Let gradients flow to what the method trains, by name."""
    network = base.network
    is_fair_lora = method.startswith("lora-fair")
    for name, place in [*network.named_modules()]:
        if not isinstance(place, AdaptedAffine) or not isinstance(place.inner, nn.Linear):
            continue
        role = name.rpartition("transformer_blocks.")[2].partition(".")[2]  # without the block's number
        in_block = "transformer_blocks." in name
        if (is_fair_lora and in_block) or (method == "lora-qkv" and role in ("attn1.to_q", "attn1.to_k", "attn1.to_v")):
            place.inner = Lora(place.inner, _RANKS[method])  # pyright: ignore[reportAttributeAccessIssue]
        elif method == "modules" and role in ("attn1.to_out.0", "ff.net.2"):
            place.inner = Bottleneck(place.inner, WIDTH)  # pyright: ignore[reportAttributeAccessIssue]
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in network.named_parameters():
        leaf = name.rpartition(".")[2]
        is_added = ".down" in name or ".up" in name
        if method == "full" or is_added or (is_fair_lora and leaf == "bias"):
            parameter.requires_grad_(True)
            chosen[name] = parameter
    return chosen


class Peak:
    """The most memory that this process held since now, above what it held then."""

    def __init__(self) -> None:
        self._can_reset = True
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._can_reset = False
        self._before = _status("VmRSS") if self._can_reset else _max_rss()

    def bytes(self) -> int:
        return max(0, (_status("VmHWM") if self._can_reset else _max_rss()) - self._before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 0


def _max_rss() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
