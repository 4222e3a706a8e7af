"""Claimed image requests on their way through the engines: rows in, PNGs out, each request written down once."""

import hashlib
import json
from concurrent.futures import Future
from dataclasses import dataclass, field

import structlog

from core import faults
from core.errors import DomainError, Unavailable
from core.samples import service as samples
from core.samples.service import SamplePlan
from core.sampling.engine import Sampled
from core.sampling.request import SampleRequest
from core.storage import keys
from worker.pictures import encode_png
from worker.runtime import Runtime

log = structlog.get_logger()


@dataclass
class Drawn:
    """One request and the futures of its images."""

    plan: SamplePlan
    images: list[Future[Sampled]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return all(image.done() for image in self.images)


class Drawing:
    """Driven by the pump, which owns the device thread; delivery runs on the runtime's pool."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._services = runtime.services
        self._under_way: list[Drawn] = []
        self._delivering: list[tuple[Drawn, Future[None]]] = []

    @property
    def is_busy(self) -> bool:
        return bool(self._under_way or self._delivering)

    def plans(self) -> list[SamplePlan]:
        """What a heartbeat must keep alive."""
        return [drawn.plan for drawn in self._under_way] + [drawn.plan for drawn, _ in self._delivering]

    def claim(self) -> int:
        """Take waiting requests while the engines have room for about one more batch behind the present one."""
        settings = self._services.settings
        rows = sum(len(drawn.images) for drawn in self._under_way)
        room = 2 * settings.max_batch_rows - rows
        if room <= 0:
            return 0
        with self._services.database.read() as session:
            if not samples.is_waiting(session, self._services.catalog):
                return 0
        with self._services.database.write() as session:
            plans = samples.claim(
                session, self._services.worker, settings.lease_seconds, self._services.catalog, limit=room
            )
        for plan in plans:
            faults.point("claimed")
            self._submit(plan)
        return len(plans)

    def step(self) -> int:
        """One denoising step of every engine that has rows; how many rows moved."""
        rows = sum(engine.step() for engine in self._runtime.engines())
        if rows:
            faults.point("mid_sample")
        return rows

    def harvest(self) -> None:
        """Hand finished requests to the pool, and forget those that are delivered."""
        done = [drawn for drawn in self._under_way if drawn.is_done]
        self._under_way = [drawn for drawn in self._under_way if not drawn.is_done]
        for drawn in done:
            self._delivering.append((drawn, self._runtime.pool.submit(self._deliver, drawn)))
        delivered = [pair for pair in self._delivering if pair[1].done()]
        self._delivering = [pair for pair in self._delivering if not pair[1].done()]
        for drawn, future in delivered:
            if error := future.exception():
                log.error("sample.undelivered", sample_id=drawn.plan.sample_id, exc_info=error)

    def _submit(self, plan: SamplePlan) -> None:
        """A request that cannot even start fails alone."""
        try:
            engine = self._runtime.device(plan.base).engine
            if plan.adapter_digest and plan.adapter_key:
                self._runtime.know(plan.adapter_digest, plan.adapter_key)
            elif plan.spec.guidance == "domain":
                raise DomainError("domain guidance needs an adapter", code="adapter_missing")
            self._under_way.append(Drawn(plan, [engine.submit(request) for request in _requests(plan)]))
        except DomainError as error:
            self._fail(plan, error)

    def _deliver(self, drawn: Drawn) -> None:
        """Encode, store, write down, tell. Runs on the pool."""
        plan = drawn.plan
        with structlog.contextvars.bound_contextvars(
            tenant_id=plan.tenant_id, sample_id=plan.sample_id, attempt=plan.attempt
        ):
            try:
                sampled = [image.result() for image in drawn.images]
                images = [self._store(plan, index, result) for index, result in enumerate(sampled)]
            except Unavailable as error:
                log.warning("sample.postponed", error=str(error))
                self._postpone(plan, error)
                return
            except Exception as error:
                self._fail(plan, error)
                return
            stats = _stats(sampled)
            with self._services.database.write() as session:
                held = samples.finish(session, plan, images, stats)
            self._services.nudges.announce(plan.sample_id)
            log.info("sample.drawn", images=len(images), held=held, **stats)

    def _store(self, plan: SamplePlan, index: int, sampled: Sampled) -> dict[str, object]:
        seed = plan.spec.seed + index
        settings = {**plan.spec.to_json(), "seed": seed, "n": 1}
        text = {
            "Software": "DiffFit",
            "base": plan.base,
            "adapter": plan.adapter_digest or "",
            "settings": json.dumps(settings),
        }
        data = encode_png(sampled.image, text)
        key = keys.image(plan.tenant_id, plan.sample_id, plan.attempt, index)
        self._services.store.put(key, data, "image/png")
        return {"key": key, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "seed": seed}

    def _postpone(self, plan: SamplePlan, error: Unavailable) -> None:
        """The store is away: again later, but not for ever."""
        if plan.attempt >= self._services.settings.max_attempts:
            self._fail(plan, error)
            return
        with self._services.database.write() as session:
            samples.release(session, plan)

    def _fail(self, plan: SamplePlan, error: Exception) -> None:
        """The caller learns a code that it can act on; what we did not expect keeps its traceback here."""
        if isinstance(error, DomainError):
            code, message = error.code, str(error)
            log.info("sample.failed", sample_id=plan.sample_id, code=code)
        else:
            code, message = "internal_error", "the images could not be drawn"
            log.error("sample.failed", sample_id=plan.sample_id, exc_info=error)
        with self._services.database.write() as session:
            samples.fail(session, plan, code=code, message=message)
        self._services.nudges.announce(plan.sample_id)


def _requests(plan: SamplePlan) -> list[SampleRequest]:
    spec = plan.spec
    return [
        SampleRequest(
            id=f"{plan.sample_id}/{plan.attempt}/{index}",
            tenant=plan.tenant_id,
            adapter_digest=plan.adapter_digest,
            label=spec.label,
            seed=spec.seed + index,
            steps=spec.steps,
            solver=spec.solver,
            guidance=spec.guidance,
            guidance_scale=spec.guidance_scale,
            adapter_scale=spec.adapter_scale,
        )
        for index in range(spec.n)
    ]


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
