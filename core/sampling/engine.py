"""The engine: rows of many requests, tenants, adapters, steps and solvers in one forward pass.

Whoever owns the device drives `step()`; `submit` and `cancel` may come from any thread.
"""

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from threading import Event, Lock

import numpy as np
import torch
from torch import Tensor

from core.diffusion.bank import BASE_SLOT, NULL_LABEL, AdapterBank
from core.diffusion.base import Base
from core.diffusion.guidance import guide, is_guided
from core.diffusion.layout import AdapterLayout
from core.diffusion.solvers import Plan, Update, make_plan
from core.errors import Conflict, Invalid, Unavailable
from core.sampling.batcher import Batcher
from core.sampling.request import SampleRequest
from core.sampling.slots import AdapterSlots, LoadAdapter, Residency, Seat

MAX_WAITING = 4096
MAX_SIZE_FACTOR = 2
SPACING = "trailing"


class Cancelled(Conflict):
    """The request was cancelled before its image was done."""

    code = "cancelled"


class QueueFull(Unavailable):
    """More requests wait than the engine takes."""

    code = "queue_full"


class NotFinite(Invalid):
    """The image came out as NaN or Inf: the adapter or its scale drives the base out of its range."""

    code = "image_not_finite"


@dataclass(frozen=True)
class SampleStats:
    """How an image came about. `batch_size` and `distinct_adapters` are the largest that it shared a pass with."""

    adapter_residency: Residency
    adapter_load_ms: float
    queue_ms: float
    compute_ms: float
    batch_size: int
    distinct_adapters: int
    steps: int


@dataclass(frozen=True)
class Sampled:
    image: np.ndarray  # (s, s, 3) uint8
    stats: SampleStats


@dataclass(eq=False)
class _Row:
    """One image on its way."""

    request: SampleRequest
    future: "Future[Sampled]"
    plan: Plan
    side: int
    submitted_at: float
    arrived: Residency = "hot"
    seat: Seat = field(default=Seat(BASE_SLOT, "hot", 0.0, 0))
    x: Tensor | None = None  # (C, h, w)
    previous: Tensor | None = None  # (C, h, w)
    step: int = 0
    started_at: float = 0.0
    batch_size: int = 0
    distinct_adapters: int = 0

    @property
    def label(self) -> int:
        return NULL_LABEL if self.request.label is None else self.request.label

    @property
    def runs_twice(self) -> bool:
        """Whether this step has a second branch."""
        level = float(self.plan.levels[self.step])
        return self.request.is_guided and is_guided(level, self.request.guidance_interval)


class Engine:
    """One base on one device with the bank of its resident adapters.

    `layout` is the widest that requests may bring: an adapter of a smaller one is zero, which is the base, elsewhere.
    """

    def __init__(
        self,
        base: Base,
        layout: AdapterLayout,
        *,
        slots: int,
        max_rows: int,
        load_adapter: LoadAdapter,
        max_waiting: int = MAX_WAITING,
        host_bytes: int = 1 << 30,
    ) -> None:
        if max_rows < 2:
            raise Invalid("max_rows must be at least 2: a guided image takes two")
        self.base = base
        self.bank = AdapterBank(layout, base, slots)
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._wake = Event()
        self._slots = AdapterSlots(self.bank, load_adapter, host_bytes=host_bytes, wake=self._wake)
        self._batcher = Batcher()
        self._lock = Lock()
        self._arrivals: deque[_Row] = deque()
        self._cancelled: set[str] = set()
        self._known: dict[str, _Row] = {}  # every request that is neither done nor failed
        self._waiting: dict[str, _Row] = {}
        self._active: list[_Row] = []
        self._gathered: tuple[object, Tensor | None, Tensor] | None = None
        self._is_closed = False

    # --- from any thread

    def submit(self, request: SampleRequest) -> "Future[Sampled]":
        """Queue an image. What is wrong with the request itself is raised here; the rest comes with the future."""
        row = self._row(request)
        with self._lock:
            if self._is_closed:
                raise QueueFull("the engine is closed")
            if len(self._known) >= self._max_waiting:
                raise QueueFull(f"{self._max_waiting} requests wait already")
            if request.id in self._known:
                raise Conflict(f"request {request.id} is under way already")
            self._known[request.id] = row
            self._arrivals.append(row)
        self._wake.set()
        return row.future

    def cancel(self, request_id: str) -> bool:
        """Stop a request before its next step; False if it is not here any more."""
        with self._lock:
            if request_id not in self._known:
                return False
            self._cancelled.add(request_id)
        self._wake.set()
        return True

    def wait(self, seconds: float) -> None:
        """Sleep until something arrives, an adapter is loaded, or the time is over."""
        self._wake.wait(seconds)

    @property
    def has_work(self) -> bool:
        with self._lock:
            return bool(self._known)

    # --- from the thread that owns the device

    def step(self) -> int:
        """One denoising step of every active image; how many moved. 0 is idle, or only waiting for adapters."""
        self._wake.clear()
        self._take_in()
        self._admit()
        moved = 0
        for side in sorted({row.side for row in self._active}):
            group = [row for row in self._active if row.side == side]
            try:
                self._denoise(group)
            except Exception as error:  # whatever it is, its rows must not wait for ever
                for row in group:
                    self._drop(row, error)
            moved += len(group)
        self._retire()
        self._batcher.tick()
        return moved

    def close(self) -> None:
        """Fail what is under way and stop the loading threads."""
        with self._lock:
            self._is_closed = True
            known = list(self._known.values())
            self._arrivals.clear()
        for row in known:
            self._drop(row, Cancelled("the engine was closed"))
        self._active.clear()
        self._slots.close()

    def _row(self, request: SampleRequest) -> _Row:
        base = self.base
        solver = "euler" if base.prediction == "flow" and request.solver == "dpm++" else request.solver
        if request.adapter_digest is None and request.label is not None and request.label >= base.num_classes:
            raise Invalid(f"the base has {base.num_classes} classes", code="unknown_class", pointer="/label")
        plan = make_plan(base.schedule, solver, request.steps, SPACING)
        return _Row(request, Future(), plan, self._side(request.size), time.perf_counter())

    def _side(self, size: int | None) -> int:
        base = self.base
        if size is None:
            return base.sample_size
        factor = base.image_size // base.sample_size
        if size % (factor * base.summary.patch_size) or size > MAX_SIZE_FACTOR * base.image_size:
            unit, most = factor * base.summary.patch_size, MAX_SIZE_FACTOR * base.image_size
            raise Invalid(f"size must be a multiple of {unit} up to {most}", pointer="/size")
        return size // factor

    def _take_in(self) -> None:
        """Arrivals, cancellations and finished loads."""
        with self._lock:
            arrivals, self._arrivals = list(self._arrivals), deque()
            cancelled, self._cancelled = self._cancelled, set()
        for row in arrivals:
            request = row.request
            self._waiting[request.id] = row
            self._batcher.add(request.id, request.tenant, request.rows, request.work)
            if request.adapter_digest is not None:
                row.arrived = self._slots.want(request.adapter_digest)
        for digest, error in self._slots.poll().items():
            for row in [row for row in self._waiting.values() if row.request.adapter_digest == digest]:
                self._drop(row, error)
        for row in [*self._waiting.values(), *self._active]:
            if row.request.id in cancelled or row.future.cancelled():
                self._drop(row, Cancelled("the request was cancelled"))

    def _admit(self) -> None:
        """Start waiting images while there is room."""
        room = self._max_rows - sum(row.request.rows for row in self._active)
        while room > 0 and (request_id := self._batcher.next(room, self._is_ready)) is not None:
            row = self._waiting[request_id]
            try:
                self._start(row)
            except Exception as error:
                self._drop(row, error)
                continue
            room -= row.request.rows

    def _is_ready(self, request_id: str) -> bool:
        digest = self._waiting[request_id].request.adapter_digest
        return digest is None or self._slots.is_ready(digest)

    def _start(self, row: _Row) -> None:
        request = row.request
        digest = request.adapter_digest
        if digest is not None:
            classes = self._slots.classes(digest)
            if request.label is not None and classes is not None and request.label >= classes:
                raise Invalid(f"the adapter has {classes} classes", code="unknown_class", pointer="/label")
            row.seat = self._slots.seat(digest, row.arrived)
        del self._waiting[request.id]
        row.started_at = time.perf_counter()
        noise = torch.Generator().manual_seed(request.seed)
        row.x = torch.randn(self.base.channels, row.side, row.side, generator=noise).to(self.base.device)
        row.previous = torch.zeros_like(row.x)
        self._active.append(row)

    @torch.no_grad()
    def _denoise(self, rows: Sequence[_Row]) -> None:
        """One step of rows of one size: conditional and guidance branches in one forward pass."""
        base = self.base
        guided = [number for number, row in enumerate(rows) if row.runs_twice]
        theta, c_rows = self._gather(rows, guided)
        x = torch.stack([row.x for row in rows if row.x is not None])  # (B, C, h, w)
        times = torch.tensor([float(row.plan.times[row.step]) for row in rows]).to(base.device)  # (B,)
        again = torch.tensor(guided, dtype=torch.long, device=base.device)
        batch, t = torch.cat([x, x[again]]), torch.cat([times, times[again]])
        out = base.forward(batch, t, theta, c_rows, self.bank.layout, self.bank.in_use)[:, : base.channels].float()
        conditional = out[: len(rows)]
        if guided:
            scale = torch.tensor([rows[number].request.guidance_scale for number in guided], device=base.device)
            conditional = conditional.clone()
            conditional[again] = guide(conditional[again], out[len(rows) :], scale)
        update = Update.of([row.plan for row in rows], [row.step for row in rows], base.device)
        previous = torch.stack([row.previous for row in rows if row.previous is not None])
        following, x0 = update(x, conditional, previous)
        distinct = len({row.request.adapter_digest for row in rows} - {None})
        for number, row in enumerate(rows):
            row.x, row.previous = following[number], x0[number]
            row.step += 1
            row.batch_size = max(row.batch_size, len(batch))
            row.distinct_adapters = max(row.distinct_adapters, distinct)

    def _gather(self, rows: Sequence[_Row], guided: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        """Vectors (B + G, P) and class rows (B + G, H); kept while the same rows go on, for they do not change."""
        branches = [(row.seat.slot, row.label, float(row.request.adapter_scale)) for row in rows]
        for number in guided:
            row = rows[number]
            own = row.request.guidance == "cfg"
            branches.append((row.seat.slot if own else BASE_SLOT, NULL_LABEL, float(row.request.adapter_scale)))
        key = (self.bank.version, tuple(branches))
        if self._gathered is None or self._gathered[0] != key:
            slots, labels, scales = (torch.tensor(column) for column in zip(*branches, strict=True))
            theta = self.bank.rows(slots, scales) if bool(slots.any()) else None
            self._gathered = (key, theta, self.bank.class_rows(slots, labels, scales))
        return self._gathered[1], self._gathered[2]

    def _retire(self) -> None:
        """Decode what is done and answer it."""
        done = [row for row in self._active if row.step >= len(row.plan)]
        for side in sorted({row.side for row in done}):
            group = [row for row in done if row.side == side]
            latents = torch.stack([row.x for row in group if row.x is not None])
            finite = torch.isfinite(latents).flatten(1).all(1).tolist()
            images = self.base.decode(latents.nan_to_num(0.0, 0.0, 0.0))
            for row, image, is_finite in zip(group, images, finite, strict=True):
                if is_finite:
                    self._finish(row, image)
                else:
                    self._drop(row, NotFinite("the image is not finite; try a smaller adapter_scale or guidance_scale"))

    def _finish(self, row: _Row, image: np.ndarray) -> None:
        stats = SampleStats(
            adapter_residency=row.seat.residency,
            adapter_load_ms=row.seat.load_ms,
            queue_ms=1000 * (row.started_at - row.submitted_at),
            compute_ms=1000 * (time.perf_counter() - row.started_at),
            batch_size=row.batch_size,
            distinct_adapters=row.distinct_adapters,
            steps=row.step,
        )
        self._forget(row)
        if row.future.set_running_or_notify_cancel():
            row.future.set_result(Sampled(image, stats))

    def _drop(self, row: _Row, error: Exception) -> None:
        self._forget(row)
        with contextlib.suppress(InvalidStateError):  # its caller cancelled the future: nobody waits for an answer
            row.future.set_exception(error)

    def _forget(self, row: _Row) -> None:
        """Take a row out of wherever it is; its seat is free again."""
        request = row.request
        digest = request.adapter_digest
        with self._lock:
            self._known.pop(request.id, None)
        self._batcher.remove(request.id)
        if self._waiting.pop(request.id, None) is not None and digest is not None:
            self._slots.unwant(digest)
        elif row in self._active:
            self._active.remove(row)
            if digest is not None:
                self._slots.leave(digest)
