"""The engine: rows of many requests, tenants, adapters, steps and solvers in one forward pass.

Whoever owns the device drives `step()`; `submit` and `cancel` may come from any thread.
"""

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from functools import lru_cache, partial
from threading import Event, Lock

import numpy as np
import structlog
import torch

from core.diffusion.bank import AdapterBank
from core.diffusion.base import Base
from core.diffusion.catalog import MAX_SIZE_FACTOR
from core.diffusion.guidance import guide
from core.diffusion.layout import AdapterLayout
from core.diffusion.solvers import Update, make_plan
from core.errors import Conflict, Invalid, Unavailable
from core.out_of_memory import halved, is_out_of_memory, let_go
from core.sampling.batcher import Batcher
from core.sampling.conditioning import Conditioning
from core.sampling.decoder import Decoder
from core.sampling.request import MAX_PARTS, SampleRequest
from core.sampling.row import OnPreview, Row, Sampled
from core.sampling.slots import AdapterSlots, LoadAdapter

log = structlog.get_logger()

MAX_WAITING = 4096
SPACING = "trailing"


class Cancelled(Conflict):
    """The request was cancelled before its image was done."""

    code = "cancelled"


class QueueFull(Unavailable):
    """More requests wait than the engine takes."""

    code = "queue_full"


class DeadlineExceeded(Unavailable):
    """The image was not done within the request's timeout."""

    code = "deadline_exceeded"


class NotFinite(Invalid):
    """The image came out as NaN or Inf: the adapter or its scale drives the base out of its range."""

    code = "image_not_finite"


class Engine:
    """One base on one device with the bank of its resident adapters.

    `layout` is the widest that requests may bring: an adapter of a smaller one is zero, which is the base, elsewhere.
    With `buckets` a pass has one of these numbers of rows, filled up with rows that nobody looks at: compiled code then
    sees few shapes. `pinned` adapters are loaded at once and never leave the device.

    `few_rows` is for devices whose passes take as long as they have rows, which are CPUs: with a short queue a pass has
    at most so many rows, and with a longer one half of what there is to do, up to `max_rows`. What came first is then
    not slowed down by what came later, and a full queue is served no slower.
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
        few_rows: int | None = None,
        buckets: Sequence[int] = (),
        pinned: Sequence[str] = (),
    ) -> None:
        if max_rows < 2:
            raise Invalid("max_rows must be at least 2: a guided image takes two")
        if len(pinned) + MAX_PARTS >= slots and pinned:
            raise Invalid(f"{slots} slots leave {slots - 1 - MAX_PARTS} for pinned adapters, not {len(pinned)}")
        self.base = base
        self.bank = AdapterBank(layout, base, slots)
        self._max_rows = max_rows
        self._pass_images = max_rows  # fewer from when memory runs out until the engine is idle
        self._few_rows = max_rows if few_rows is None else few_rows
        self._max_waiting = max_waiting
        self._wake = Event()
        self._slots = AdapterSlots(self.bank, load_adapter, host_bytes=host_bytes, wake=self._wake)
        self._batcher = Batcher()
        self._lock = Lock()
        self._arrivals: deque[Row] = deque()
        self._cancelled: set[str] = set()
        self._known: dict[str, Row] = {}  # every request that is neither done nor failed
        self._waiting: dict[str, Row] = {}
        self._active: list[Row] = []
        self._conditioning = Conditioning(self.bank, buckets)
        self._decoder = Decoder(base.decode)
        self._plan = lru_cache(maxsize=256)(partial(make_plan, base.schedule, spacing=SPACING))
        self._is_closed = False
        for digest in pinned:
            self._slots.pin(digest)

    # --- from any thread

    def submit(self, request: SampleRequest, on_preview: OnPreview | None = None) -> "Future[Sampled]":
        """Queue an image. What is wrong with the request itself is raised here; the rest comes with the future.

        `on_preview` is called, on a thread of the engine's, with the step and the picture (s, s, 3) expected by then.
        """
        row = self._row(request, on_preview)
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

    @property
    def resident(self) -> list[str]:
        """Digests of the adapters on the device, least recently used first."""
        return self._slots.resident

    # --- from the thread that owns the device

    def step(self) -> int:
        """One denoising step of every active image; how many moved. 0 is idle, or only waiting for adapters."""
        self._wake.clear()
        if not self._active:
            self._pass_images = self._max_rows
        self._take_in()
        self._admit()
        moved = 0
        for side in sorted({row.side for row in self._active}):
            group = [row for row in self._active if row.side == side]
            self._advance(group)
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
        self._decoder.close()
        self._slots.close()

    def _row(self, request: SampleRequest, on_preview: OnPreview | None) -> Row:
        base = self.base
        solver = "euler" if base.prediction == "flow" and request.solver == "dpm++" else request.solver
        if request.label is not None and request.label >= base.num_classes:
            raise Invalid(f"the base has {base.num_classes} classes", code="unknown_class", pointer="/label")
        if len(request.adapters) >= self.bank.slots:
            raise Invalid(f"the engine holds {self.bank.slots - 1} adapters at once", pointer="/adapters")
        plan = self._plan(solver, request.steps)
        return Row(request, Future(), plan, self._side(request.size), time.perf_counter(), on_preview)

    def _side(self, size: int | None) -> int:
        base = self.base
        if size is None:
            return base.sample_size
        unit, most = base.summary.size_unit, MAX_SIZE_FACTOR * base.image_size
        if size % unit or size > most:
            raise Invalid(f"size must be a multiple of {unit} up to {most}", pointer="/size")
        return size * base.sample_size // base.image_size

    def _take_in(self) -> None:
        """Arrivals, cancellations and finished loads."""
        with self._lock:
            arrivals, self._arrivals = list(self._arrivals), deque()
            cancelled, self._cancelled = self._cancelled, set()
        for row in arrivals:
            request = row.request
            self._waiting[request.id] = row
            self._batcher.add(request.id, request.tenant, request.rows, request.work)
            for digest in row.digests:
                row.arrived[digest] = self._slots.want(digest)
        for digest, error in self._slots.poll().items():
            for row in [row for row in self._waiting.values() if digest in row.digests]:
                self._drop(row, error)
        for row in [*self._waiting.values(), *self._active]:
            if row.request.id in cancelled or row.future.cancelled():
                self._drop(row, Cancelled("the request was cancelled"))
            elif row.is_late:
                self._drop(row, DeadlineExceeded(f"not done within {row.request.timeout:g} s"))

    def _admit(self) -> None:
        """Start waiting images while there is room."""
        active = sum(row.request.rows for row in self._active)
        waiting = sum(row.request.rows for row in self._waiting.values())
        room = min(self._max_rows, max(self._few_rows, (active + waiting) // 2)) - active
        while room > 0 and (request_id := self._batcher.next(room, self._is_ready, self._is_loaded)) is not None:
            row = self._waiting[request_id]
            try:
                self._start(row)
            except Exception as error:
                self._drop(row, error)
                continue
            room -= row.request.rows

    def _is_ready(self, request_id: str) -> bool:
        return self._slots.is_ready(self._waiting[request_id].digests)

    def _is_loaded(self, request_id: str) -> bool:
        return self._slots.is_loaded(self._waiting[request_id].digests)

    def _start(self, row: Row) -> None:
        request = row.request
        for part in request.adapters:
            classes = self._slots.classes(part.digest)
            if part.label is not None and classes is not None and part.label >= classes:
                raise Invalid(f"the adapter has {classes} classes", code="unknown_class", pointer="/label")
        noise = torch.Generator().manual_seed(request.seed)
        row.x = torch.randn(self.base.channels, row.side, row.side, generator=noise).to(self.base.device)
        row.previous = torch.zeros_like(row.x)
        # Last of what can fail: who fails before holds no seats, who comes through is active and will leave them.
        seats = self._slots.seat_all(row.arrived)
        row.seats = [seats[part.digest] for part in request.adapters]
        del self._waiting[request.id]
        row.started_at = time.perf_counter()
        self._active.append(row)

    def _advance(self, group: Sequence[Row]) -> None:
        """One step of each: in one pass, or in smaller ones where memory runs out."""
        left = list(group)
        while left:
            rows, left = left[: self._pass_images], left[self._pass_images :]
            try:
                self._denoise(rows)
                continue
            except Exception as error:
                failure = error
            if len(rows) > 1 and is_out_of_memory(failure):
                let_go(failure, self.base.device)
                log.warning("pass.halved", images=len(rows), error=repr(failure))
                self._pass_images = halved(len(rows))
                left = rows + left
                continue
            for row in rows:  # whatever it is, they must not wait for ever
                self._drop(row, failure)

    @torch.no_grad()
    def _denoise(self, rows: Sequence[Row]) -> None:
        """One step of rows of one size: conditional and guidance branches in one forward pass."""
        base = self.base
        guided = [number for number, row in enumerate(rows) if row.runs_twice]
        branches = [row.branch(is_second=False) for row in rows]
        branches += [rows[number].branch(is_second=True) for number in guided]
        theta, c_rows = self._conditioning.of(branches)  # (B + G + padding, P) and (·, H)
        x = torch.stack([row.x for row in rows if row.x is not None])  # (B, C, h, w)
        times = torch.tensor([float(row.plan.times[row.step]) for row in rows]).to(base.device)  # (B,)
        again = torch.tensor(guided, dtype=torch.long, device=base.device)
        batch, t = torch.cat([x, x[again]]), torch.cat([times, times[again]])
        if padding := len(c_rows) - len(batch):
            batch, t = torch.cat([batch, batch[:1].expand(padding, -1, -1, -1)]), torch.cat([t, t[:1].expand(padding)])
        out = base.draw(batch, t, theta, c_rows, self.bank.layout, self.bank.in_use)[:, : base.channels].float()
        conditional = out[: len(rows)]
        if guided:
            scale = torch.tensor([rows[number].request.guidance_scale for number in guided], device=base.device)
            conditional = conditional.clone()
            conditional[again] = guide(conditional[again], out[len(rows) : len(rows) + len(guided)], scale)
        update = Update.of([row.plan for row in rows], [row.step for row in rows], base.device)
        previous = torch.stack([row.previous for row in rows if row.previous is not None])
        following, x0 = update(x, conditional, previous)
        distinct = len({digest for row in rows for digest in row.digests})
        for number, row in enumerate(rows):
            row.x, row.previous = following[number], x0[number]
            row.step += 1
            row.batch_size = max(row.batch_size, len(rows) + len(guided))
            row.distinct_adapters = max(row.distinct_adapters, distinct)
            if row.on_preview is not None and row.step in row.request.previews and row.step < len(row.plan):
                self._decoder.put(x0[number], partial(row.show, row.step))

    def _retire(self) -> None:
        """What is done leaves the batch, to be decoded and answered by another thread."""
        for row in [row for row in self._active if row.step >= len(row.plan)]:
            assert row.x is not None
            self._active.remove(row)
            self._leave(row)
            if torch.isfinite(row.x).all():
                self._decoder.put(row.x, partial(self._finish, row))
            else:
                self._drop(row, NotFinite("the image is not finite; try a smaller adapter_scale or guidance_scale"))

    def _leave(self, row: Row) -> None:
        for digest in row.digests:
            self._slots.leave(digest)

    def _finish(self, row: Row, image: np.ndarray | Exception) -> None:
        """From the decoder's thread."""
        self._answer(row, image if isinstance(image, Exception) else Sampled(image, row.stats()))

    def _drop(self, row: Row, error: Exception) -> None:
        """Take a row out of wherever it is; its seats are free again."""
        self._batcher.remove(row.request.id)
        if self._waiting.pop(row.request.id, None) is not None:
            for digest in row.digests:
                self._slots.unwant(digest)
        elif row in self._active:
            self._active.remove(row)
            self._leave(row)
        self._answer(row, error)

    # --- from both

    def _answer(self, row: Row, outcome: Sampled | Exception) -> None:
        """The request is over: it is known no more, and who waits for it learns how it ended."""
        with self._lock:
            self._known.pop(row.request.id, None)
        with contextlib.suppress(InvalidStateError):  # the engine was closed, or its caller cancelled the future
            if isinstance(outcome, Exception):
                row.future.set_exception(outcome)
            else:
                row.future.set_result(outcome)
        self._wake.set()
