"""Claimed image requests on their way through the engines: rows in, PNGs out, each request written down once."""

import hashlib
import json
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock

import numpy as np
import structlog
from sqlalchemy.exc import SQLAlchemyError

from core import faults, nudges
from core.errors import DomainError, Unavailable
from core.samples import service as samples
from core.samples.service import SamplePlan
from core.samples.spec import MEDIA_TYPES
from core.sampling.engine import Cancelled, DeadlineExceeded
from core.sampling.request import AdapterPart, SampleRequest
from core.sampling.row import OnPreview, Sampled
from core.storage import keys
from worker.pictures import encode
from worker.runtime import Runtime

log = structlog.get_logger()

_MOST_ATTEMPTS = 15  # with a store that does not answer, and the rests between them: some ten minutes


@dataclass
class Drawn:
    """One request and the futures of its images."""

    plan: SamplePlan
    images: list[Future[Sampled]]
    is_cancelled: bool = False
    delivery: Future[None] | None = None

    @property
    def is_drawn(self) -> bool:
        return all(image.done() for image in self.images)


class Drawing:
    """Driven by the pump, which owns the device thread; delivery runs on the runtime's pool."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._services = runtime.services
        self._under_way: list[Drawn] = []
        self._lock = Lock()

    @property
    def is_busy(self) -> bool:
        return bool(self._under_way)

    @property
    def is_drawing(self) -> bool:
        """Whether anybody waits for the device."""
        return any(drawn.delivery is None for drawn in self._under_way)

    def plans(self) -> list[SamplePlan]:
        """What a heartbeat must keep alive."""
        return [drawn.plan for drawn in self._under_way]

    @property
    def holds_suspect(self) -> bool:
        """A request that a worker died with."""
        return any(drawn.plan.crashes for drawn in self._under_way)

    def claim(self, is_told: bool = False, suspects: bool = True) -> int:
        """Take waiting requests while the engines have room for about one more batch behind the present one.

        `is_told` that there is some: it then claims at once. Most polls end with a look, and give up what is too late.
        Of the `suspects`, which a worker has died with, no more than one.
        """
        self._heed_cancels()
        rows = sum(len(drawn.images) for drawn in self._under_way if drawn.delivery is None)
        room = 2 * self._runtime.max_rows - rows
        if room <= 0 or self._runtime.drawing_rest.is_on:
            return 0
        if not is_told:
            with self._services.database.read() as session:
                if not samples.is_waiting(session, self._services.catalog):
                    return 0
        with self._services.database.write() as session:
            if not is_told:
                samples.expire(session)
            worker, lease_seconds = self._services.worker, self._services.settings.lease_seconds
            plans = samples.claim(session, worker, lease_seconds, self._services.catalog, room)
            if suspects:
                plans += samples.claim(session, worker, lease_seconds, self._services.catalog, 1, suspects=True)
        for plan in plans:
            faults.point("claimed")
            self._submit(plan)
        return len(plans)

    def _heed_cancels(self) -> None:
        """A request that its caller gave up frees its rows at the next step."""
        drawing = {
            drawn.plan.sample_id: drawn
            for drawn in self._under_way
            if drawn.delivery is None and not drawn.is_cancelled
        }
        if not drawing:
            return
        with self._services.database.read() as session:
            cancelled = samples.list_cancelled(session, list(drawing))
        for sample_id in cancelled:
            drawing[sample_id].is_cancelled = True
            engine = self._runtime.device(drawing[sample_id].plan.base).engine
            for request in _requests(drawing[sample_id].plan):
                engine.cancel(request.id)

    def step(self) -> int:
        """One denoising step of every engine that has rows; how many rows moved."""
        rows = sum(engine.step() for engine in self._runtime.engines())
        if rows:
            faults.point("mid_sample")
        return rows

    def harvest(self) -> None:
        """Forget the requests that are delivered."""
        still: list[Drawn] = []
        for drawn in self._under_way:
            if drawn.delivery is None or not drawn.delivery.done():
                still.append(drawn)
            elif error := drawn.delivery.exception():
                log.error("sample.undelivered", sample_id=drawn.plan.sample_id, exc_info=error)
        self._under_way = still

    def _submit(self, plan: SamplePlan) -> None:
        """A request that cannot even start fails alone, whatever it is: a base that does not load is one."""
        images: list[Future[Sampled]] = []
        try:
            engine = self._runtime.device(plan.base).engine
            for adapter in plan.adapters:
                self._runtime.know(adapter.digest, adapter.key)
            for index, request in enumerate(_requests(plan)):
                images.append(engine.submit(request, self._shows(plan, index) if request.previews else None))
        except Exception as error:
            for image in images:
                image.cancel()
            self._fail(plan, error)
            return
        drawn = Drawn(plan, images)
        self._under_way.append(drawn)
        for image in images:
            image.add_done_callback(lambda _: self._ended(drawn))

    def _ended(self, drawn: Drawn) -> None:
        """An image is drawn or never will be, says whatever thread knows it first: the last one starts the delivery."""
        with self._lock:
            if drawn.delivery is None and drawn.is_drawn:
                drawn.delivery = self._runtime.pool.submit(self._deliver, drawn)

    def _deliver(self, drawn: Drawn) -> None:
        """Encode, store, write down, tell. Runs on the pool."""
        plan = drawn.plan
        with structlog.contextvars.bound_contextvars(
            tenant_id=plan.tenant_id, sample_id=plan.sample_id, attempt=plan.attempt
        ):
            try:
                sampled = [image.result() for image in drawn.images]
                images = [self._store(plan, index, result) for index, result in enumerate(sampled)]
            except Cancelled:
                self._runtime.transactions.write(lambda session: samples.stop(session, plan))
                self._services.nudges.announce(plan.sample_id)
                return
            except DeadlineExceeded as error:
                self._fail(plan, error)
                return
            except Unavailable as error:
                log.warning("sample.postponed", error=str(error))
                self._postpone(plan, error)
                return
            except Exception as error:
                self._fail(plan, error)
                return
            self._runtime.drawing_rest.end()
            stats = _stats(sampled)
            held = self._runtime.transactions.write(lambda session: samples.finish(session, plan, images, stats))
            self._services.nudges.announce(plan.sample_id)
            log.info("sample.drawn", images=len(images), held=held, **stats)

    def _store(self, plan: SamplePlan, index: int, sampled: Sampled) -> dict[str, object]:
        key = keys.image(plan.tenant_id, plan.sample_id, plan.attempt, index)
        return {**self._put(plan, index, sampled.image, key), "seed": plan.spec.seed + index}

    def _put(self, plan: SamplePlan, index: int, pixels: np.ndarray, key: str) -> dict[str, object]:
        spec = plan.spec
        data = encode(pixels, spec.output_format, spec.output_compression, _text(plan, index))
        digest = hashlib.sha256(data).hexdigest()
        self._services.store.put(key, data, MEDIA_TYPES[spec.output_format])
        self._services.fresh.keep(digest, data)
        return {"key": key, "sha256": digest, "bytes": len(data)}

    def _shows(self, plan: SamplePlan, index: int) -> OnPreview:
        """Called on the engine's thread: what is left to do goes to the pool."""

        def show(step: int, pixels: np.ndarray) -> None:
            self._runtime.pool.submit(self._show, plan, index, step, pixels)

        return show

    def _show(self, plan: SamplePlan, index: int, step: int, pixels: np.ndarray) -> None:
        """A partial image that cannot be stored is not there; its request goes on."""
        number = plan.spec.partial_steps.index(step)
        key = keys.partial_image(plan.tenant_id, plan.sample_id, plan.attempt, index, number)
        try:
            stored = {**self._put(plan, index, pixels, key), "index": index, "number": number}
            with self._services.database.write() as session:
                samples.add_partial(session, plan, stored)
        except (Unavailable, SQLAlchemyError) as error:
            log.warning("sample.partial_lost", sample_id=plan.sample_id, error=str(error))
            return
        self._services.nudges.announce(nudges.news_of(plan.sample_id))

    def _postpone(self, plan: SamplePlan, error: Unavailable) -> None:
        """The store is away: again later, when it may be back, but not for ever."""
        self._runtime.drawing_rest.begin()
        if plan.attempt >= _MOST_ATTEMPTS:
            self._fail(plan, error)
            return
        self._runtime.transactions.write(lambda session: samples.release(session, plan))

    def _fail(self, plan: SamplePlan, error: Exception) -> None:
        """The caller learns a code that it can act on; what we did not expect keeps its traceback here."""
        if isinstance(error, DomainError):
            code, message = error.code, str(error)
            log.info("sample.failed", sample_id=plan.sample_id, code=code, key=getattr(error, "key", None))
        else:
            code, message = "internal_error", "the images could not be drawn"
            log.error("sample.failed", sample_id=plan.sample_id, exc_info=error)
        self._runtime.transactions.write_last(lambda session: samples.fail(session, plan, code=code, message=message))
        self._services.nudges.announce(plan.sample_id)


def _requests(plan: SamplePlan) -> list[SampleRequest]:
    spec = plan.spec
    return [
        SampleRequest(
            id=f"{plan.sample_id}/{plan.attempt}/{index}",
            tenant=plan.tenant_id,
            seed=spec.seed + index,
            label=spec.label,
            adapters=tuple(AdapterPart(part.digest, part.weight, part.label) for part in plan.adapters),
            steps=spec.steps,
            solver=spec.solver,
            guidance=spec.guidance,
            guidance_scale=spec.guidance_scale,
            guidance_interval=spec.guidance_interval,
            size=spec.size,
            timeout=plan.seconds_left,
            previews=spec.partial_steps,
        )
        for index in range(spec.n)
    ]


def _text(plan: SamplePlan, index: int) -> dict[str, str]:
    """What a PNG carries, so that its picture can be drawn again: the body of a request, and the adapters' digests."""
    spec = plan.spec
    parts = [{"model": part.model, "weight": part.weight} for part in spec.adapters]
    if len(parts) == 1:
        drawn_by = {"model": parts[0]["model"], "adapter_scale": parts[0]["weight"]}
    else:
        drawn_by = {"model": plan.base, **({"adapters": parts} if parts else {})}
    again = {
        **drawn_by,
        "prompt": spec.class_name or "",
        "size": f"{spec.size}x{spec.size}",
        "seed": spec.seed + index,
        "steps": spec.steps,
        "solver": spec.solver,
        "guidance": spec.guidance,
        "guidance_scale": spec.guidance_scale,
        "guidance_interval": spec.guidance_interval,
    }
    digests = [part.digest for part in plan.adapters]
    return {"Software": "DiffFit", "request": json.dumps(again), "adapters": json.dumps(digests)}


def _stats(sampled: list[Sampled]) -> dict[str, object]:
    """Of a request's images: the slowest, and the widest batch that any of them shared."""
    stats = [result.stats for result in sampled]
    return {
        "adapter_residency": stats[0].adapter_residency,
        "adapter_load_ms": max(item.adapter_load_ms for item in stats),
        "queue_ms": max(item.queue_ms for item in stats),
        "compute_ms": max(item.compute_ms for item in stats),
        "batch_size": max(item.batch_size for item in stats),
        "distinct_adapters": max(item.distinct_adapters for item in stats),
    }
