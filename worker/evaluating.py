"""One claimed evaluation: its pictures among the engine's rows, features a few at a time, distances at the end."""

import hashlib
import io
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from sqlalchemy.orm import Session

from core import faults
from core.datasets.pack import read_pack
from core.db.session import DATABASE_AWAY
from core.errors import DomainError, Unavailable
from core.evaluation.features import WIDTH, FeatureNetwork, load_features
from core.evaluation.report import Report, compare
from core.evaluations import service as evaluations
from core.evaluations.service import EvaluationPlan
from core.evaluations.spec import labels_to_draw
from core.jobs import attempts
from core.sampling.request import AdapterPart, SampleRequest
from core.sampling.row import Sampled
from core.storage import keys, verified
from core.storage.base import CorruptObject, ObjectMissing
from core.training.data import split
from core.training.randomness import generator
from worker.runtime import Runtime

log = structlog.get_logger()

_CHUNK = 8  # pictures whose features are taken at a time: about 0.2 s
_REPORT_SECONDS = 1.0
_STORE_SECONDS = 2.0  # until a store that refused is asked again
_MAX_REAL = 1_000  # pictures of the file on either side: distances are square in them


@dataclass(eq=False)
class _Work:
    """What is prepared, and how far it is."""

    network: FeatureNetwork
    real: np.ndarray  # the file's pictures: the held-out ones, then those of training
    held_out: int  # how many of them are held out
    labels: list[int]
    features: list[np.ndarray]  # (n, D) of the file's pictures, in order
    known: int  # pictures of the file whose features are taken
    drawn: list[np.ndarray]  # (n, D) of what was drawn, in order
    done: int  # drawn pictures
    next: int  # the first picture that the engine was not asked for yet


class Evaluating:
    """`advance()` does one thing at a time, so that sampling steps fit between. Driven as a `Slice` is."""

    def __init__(self, runtime: Runtime, plan: EvaluationPlan) -> None:
        self.plan = plan
        self.is_over = False
        self._runtime = runtime
        self._services = runtime.services
        self._transactions = runtime.transactions
        self._work: _Work | None = None
        self._waiting: deque[Future[Sampled]] = deque()
        self._images: list[np.ndarray] = []  # drawn, features still to be taken
        self._until = time.monotonic() + self._services.settings.slice_seconds
        self._gained = False  # whether this slice got anywhere: one that did not would begin the same again
        self._reported = self._moved = time.monotonic()

    def extend(self, session: Session, lease_seconds: float) -> None:
        evaluations.extend(session, self.plan, lease_seconds)

    def advance(self) -> None:
        """Every way in which an attempt may end is decided here."""
        plan = self.plan
        with structlog.contextvars.bound_contextvars(
            tenant_id=plan.tenant_id, evaluation_id=plan.evaluation_id, attempt=plan.attempt
        ):
            try:
                self._advance()
            except (Unavailable, *DATABASE_AWAY) as error:
                log.warning("evaluation.postponed", error=str(error))
                self._runtime.rest.begin()
                self._release()
            except DomainError as error:
                log.info("evaluation.failed", code=error.code, key=getattr(error, "key", None))
                self._fail(error.code, str(error))
            except Exception as error:
                log.exception("evaluation.crashed")
                self._put_back(type(error).__name__)

    def hand_back(self, at_once: bool = True) -> None:
        """The worker wants the device: keep the features so far and go back to the queue.

        Where it need not be `at_once` and the store refuses them, it goes on, and is asked again.
        """
        try:
            self._keep()
        except Unavailable as error:
            log.warning("evaluation.features_postponed", error=str(error))
            if not at_once:
                self._until = time.monotonic() + _STORE_SECONDS
                return
        self._release()

    def _advance(self) -> None:
        if self._work is None:
            self._work = self._prepare()
            self._runtime.rest.end()
        work, total = self._work, self.plan.spec.total
        self._ask(work)
        while self._waiting and self._waiting[0].done():
            self._images.append(self._waiting.popleft().result().image)
        if len(self._images) >= _CHUNK or (self._images and work.done + len(self._images) == total):
            taken, self._images = self._images[:_CHUNK], self._images[_CHUNK:]
            work.drawn.append(work.network(np.stack(taken)))
            work.done += len(taken)
            self._gained = True
            faults.point("evaluation_chunk")
        elif work.known < len(work.real):
            work.features.append(work.network(work.real[work.known : work.known + _CHUNK]))
            work.known += len(work.features[-1])
            self._gained = True
        if work.done == total and work.known == len(work.real):
            self._publish(work)
        elif time.monotonic() - self._reported > _REPORT_SECONDS:
            self._report(work)
        if not self.is_over and self._gained and time.monotonic() > self._until:
            self.hand_back(at_once=False)

    def _prepare(self) -> _Work:
        plan = self.plan
        if plan.adapter_digest and plan.adapter_key:
            self._runtime.know(plan.adapter_digest, plan.adapter_key)
        network = load_features()
        pack = self._runtime.pack(plan.pack_key, plan.pack_sha256)
        images, labels, classes = read_pack(pack, plan.spec.size)
        training, held_out = torch.zeros(0, dtype=torch.long), torch.arange(len(images))
        if plan.spec.part == "held_out":
            training, held_out = split(torch.tensor(labels), len(classes), plan.spec.part_seed)
        training, held_out = _some(training, "evaluated-training"), _some(held_out, "evaluated-held-out")
        names = [classes[labels[number]] for number in held_out.tolist()]
        drawn, features = self._load_partial()
        done = sum(len(rows) for rows in drawn)
        return _Work(
            network=network,
            real=images[torch.cat([held_out, training]).numpy()],
            held_out=len(held_out),
            labels=labels_to_draw(names, plan.classes, plan.spec.images),
            features=features,
            known=sum(len(rows) for rows in features),
            drawn=drawn,
            done=done,
            next=done,
        )

    def _ask(self, work: _Work) -> None:
        """Keep the engine's batch filled, and no fuller: requests for images come between."""
        spec, plan = self.plan.spec, self.plan
        engine = self._runtime.device(plan.base).engine
        while work.next < spec.total and len(self._waiting) < max(2, self._runtime.max_rows // 2):
            number = work.next % spec.images
            is_baseline = work.next >= spec.images
            request = SampleRequest(
                id=f"{plan.evaluation_id}/{plan.attempt}/{work.next}",
                tenant=plan.tenant_id,
                label=None if plan.adapter_digest else work.labels[number],
                adapters=_parts(plan.adapter_digest, work.labels[number], is_baseline),
                seed=spec.seed + number,
                size=spec.size,
                steps=spec.steps,
                solver=spec.solver,  # pyright: ignore[reportArgumentType]  # checked when it was asked for
                guidance=spec.guidance,  # pyright: ignore[reportArgumentType]
                guidance_scale=spec.guidance_scale,
            )
            self._waiting.append(engine.submit(request))
            work.next += 1

    def _report(self, work: _Work) -> None:
        def report(session: Session) -> bool:
            goes_on = evaluations.report(session, self.plan, work.done)
            self._charge(session)
            if not goes_on:
                evaluations.stop(session, self.plan)
            return goes_on

        goes_on = self._transactions.write(report)
        self._reported = time.monotonic()
        if not goes_on:
            self._end()

    # --- what is drawn so far

    def _load_partial(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Features of the pictures drawn, and of the file's, that an earlier slice took."""
        key, sha256 = self.plan.partial_key, self.plan.partial_sha256
        if key is None or sha256 is None:
            return [], []
        try:
            data = verified.get(self._services.store, key, sha256)
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return [arrays["drawn"]], [arrays["real"]]
        except (ObjectMissing, CorruptObject) as error:
            log.warning("evaluation.features_unreadable", error=str(error))
        self._transactions.write(lambda session: evaluations.drop_partial(session, self.plan))
        return [], []

    def _keep(self) -> None:
        """Object first, pointer second."""
        work, plan = self._work, self.plan
        if work is None or not self._gained:
            return
        buffer = io.BytesIO()
        np.savez(buffer, drawn=_joined(work.drawn), real=_joined(work.features))
        key = keys.evaluation(plan.tenant_id, plan.evaluation_id, plan.attempt)
        self._services.store.put(key, buffer.getvalue())
        sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
        self._transactions.write(
            lambda session: evaluations.add_partial(session, plan, drawn=work.done, key=key, sha256=sha256)
        )

    # --- ends

    def _publish(self, work: _Work) -> None:
        spec = self.plan.spec
        drawn, real = _joined(work.drawn), _joined(work.features)
        held_out, training = real[: work.held_out], real[work.held_out :]
        after = compare(drawn[: spec.images], held_out, training)
        before = compare(drawn[spec.images :], held_out, training) if spec.baseline else None
        result = {
            "after": after.to_json(),
            "before": before.to_json() if before else None,
            "moved": _moved(before, after) if before else None,
            "features": {"network": "efficientnet-lite0", "digest": work.network.digest},
        }

        def finish(session: Session) -> bool:
            self._charge(session)
            return evaluations.finish(session, self.plan, result)

        held = self._transactions.write(finish)
        self._services.nudges.announce(self.plan.evaluation_id)
        log.info("evaluation.succeeded", held=held, kernel_distance=after.kernel.value, moved=result["moved"])
        self._end()

    def _fail(self, code: str, message: str) -> None:
        self._leave(lambda session: evaluations.fail(session, self.plan, code=code, message=message))
        self._services.nudges.announce(self.plan.evaluation_id)

    def _put_back(self, reason: str) -> None:
        most = self._services.settings.max_attempts
        self._leave(lambda session: evaluations.put_back(session, self.plan, reason, most))

    def _release(self) -> None:
        self._leave(lambda session: evaluations.release(session, self.plan))
        self._services.nudges.rouse()

    def _leave(self, last: Callable[[Session], object]) -> None:
        self._transactions.write_last(last, self._charge)
        self._end()

    def _charge(self, session: Session) -> None:
        """The time since the last charge, shared with whoever else was served meanwhile."""
        moment = time.monotonic()
        attempts.charge(session, self.plan.tenant_id, moment - self._moved)
        self._moved = moment

    def _end(self) -> None:
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()
        self.is_over = True


def _some(numbers: torch.Tensor, purpose: str) -> torch.Tensor:
    """At most `_MAX_REAL` of them, the same at every attempt."""
    return numbers[torch.randperm(len(numbers), generator=generator(0, purpose))[:_MAX_REAL]].sort().values


def _joined(rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.zeros((0, WIDTH), np.float32)


def _moved(before: Report, after: Report) -> float | None:
    """The share of the way to the dataset that training went: 1 is all of it, 0 none, below 0 away from it."""
    if before.kernel.value <= 0:
        return None
    return round(1 - after.kernel.value / before.kernel.value, 4)


def _parts(digest: str | None, label: int, is_baseline: bool) -> tuple[AdapterPart, ...]:
    """At weight 0 an adapter is what it was before training."""
    return (AdapterPart(digest, 0.0 if is_baseline else 1.0, label),) if digest else ()
