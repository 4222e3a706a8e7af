"""The jobs that a worker trains at a time: of one base, in one pass where that is right, all for one slice."""

import time
from collections.abc import Sequence
from functools import partial

import structlog
from sqlalchemy.orm import Session

from core import faults
from core.jobs import claims
from core.models import Job
from core.out_of_memory import halved, is_out_of_memory, let_go
from core.training.loop import advance
from core.training.path import NumericPath
from core.training.spec import TrainSpec
from core.training.trainee import Progress, Trainee
from worker.runtime import Runtime, cpu_threads
from worker.slice import Slice

log = structlog.get_logger()

_WAIT_SECONDS = 0.02
_HASTY_ROWS = 8  # of a pass while image requests wait: they shall not wait for everybody's step


class CoTraining:
    """`advance()` does one thing at a time, so that sampling steps fit between: prepare a job, or step some.

    Jobs join and leave between steps. The slice begins with the first and ends for all at once: who could not join has
    waited no longer than that.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._services = runtime.services
        # Those that stepped longest ago first. A tuple, since the heartbeat's thread reads it.
        self._slices: tuple[Slice, ...] = ()
        self._until = 0.0
        self._row_limit = 0

    @property
    def is_empty(self) -> bool:
        return not self._slices

    @property
    def holds_suspect(self) -> bool:
        """A job that a worker died with, and that has no checkpoint of a later step yet."""
        return any(one.plan.crashes for one in self._slices)

    def claim(self, suspects: bool = True) -> bool:
        """Take the next job that may train beside those that are here; every job may where there are none.

        Without `suspects` none that a worker has died with.
        """
        if len(self._slices) >= self._services.settings.max_train_jobs or (
            self._slices and time.monotonic() > self._until
        ):
            return False
        fits = None if suspects and not self._slices else partial(self._fits, suspects=suspects)
        catalog, devices = self._services.catalog, 1 if self._slices else self._runtime.max_devices
        with self._services.database.read() as session:
            if not claims.is_waiting(session, catalog, fits, devices):
                return False
        with self._services.database.write() as session:
            settings = self._services.settings
            plan = claims.claim(
                session, self._services.worker, settings.lease_seconds, catalog, fits, devices, settings.max_steps
            )
        if plan is None:
            return False
        faults.point("claimed")
        log.info("job.claimed", job_id=plan.job_id, attempt=plan.attempt, beside=len(self._slices))
        if not self._slices:
            self._until = time.monotonic() + self._services.settings.slice_seconds
            self._row_limit = 0
        self._slices += (Slice(self._runtime, plan),)
        return True

    def advance(self, hasty: bool = False) -> None:
        """`hasty` keeps the pass short: jobs then take turns."""
        unprepared = next((one for one in self._slices if one.trainee is None), None)
        if unprepared is not None:
            unprepared.prepare()
            self._measure(unprepared)
        if unprepared is None or unprepared.trainee is None:
            self._step(self._next_group(min(self._row_limit, _HASTY_ROWS) if hasty else self._row_limit))
            # After a step, so that every slice gets somewhere; but not for one that is never prepared.
            if time.monotonic() > self._until:
                self.hand_back(at_once=False)
        self._slices = tuple(one for one in self._slices if not one.is_over)

    def hand_back(self, at_once: bool = True) -> None:
        """Checkpoint all and give them back to the queue; see `Slice.hand_back`."""
        for one in self._slices:
            if not one.is_over:
                self._runtime.moved()
                one.hand_back(at_once)
        self._slices = tuple(one for one in self._slices if not one.is_over)

    def extend(self, session: Session, lease_seconds: float) -> None:
        for one in self._slices:
            one.extend(session, lease_seconds)

    def _next_group(self, row_limit: int) -> list[tuple[Slice, Trainee]]:
        """Those whose turn it is: the first, and whoever may share its pass within the limit."""
        group: list[tuple[Slice, Trainee]] = []
        rows = 0
        for one in self._slices:
            trainee = None if one.trainee is None else one.ready()
            if trainee is None:
                continue
            if group and (rows + _rows(trainee) > row_limit or not trainee.may_share(group[0][1])):
                continue
            group.append((one, trainee))
            rows += _rows(trainee)
        return group

    def _step(self, group: list[tuple[Slice, Trainee]]) -> None:
        if not group:
            if any(not one.is_over for one in self._slices):
                time.sleep(_WAIT_SECONDS)  # all wait to be published
            return
        stepped = tuple(one for one, _ in group)
        self._slices = tuple(one for one in self._slices if one not in stepped) + stepped
        began = time.monotonic()
        outcomes = self._outcomes([trainee for _, trainee in group])
        seconds = time.monotonic() - began
        rows = sum(trainee.spec.batch_size for _, trainee in group)
        for (one, trainee), outcome in zip(group, outcomes, strict=True):
            one.took(outcome, seconds * trainee.spec.batch_size / rows)

    def _outcomes(self, trainees: list[Trainee]) -> Sequence[Progress | Exception]:
        """One pass; should it break, each by itself, so that the one that breaks it breaks alone."""
        try:
            with cpu_threads(trainees[0].path.threads):
                return advance(trainees[0].base, trainees)
        except Exception as error:
            failure = error
        if is_out_of_memory(failure):
            let_go(failure, trainees[0].base.device)
        if len(trainees) == 1:
            return [failure]
        log.warning("pass.broken", jobs=len(trainees), error=repr(failure))
        if is_out_of_memory(failure):
            self._row_limit = halved(min(self._row_limit, sum(_rows(trainee) for trainee in trainees)))
        return [outcome for trainee in trainees for outcome in self._outcomes([trainee])]

    def _measure(self, one: Slice) -> None:
        """The rows that a pass may have: as many as the settings and the memory allow."""
        if one.trainee is not None and self._row_limit == 0:
            self._row_limit = min(self._services.settings.max_train_rows, self._runtime.row_budget(one.trainee))

    def _fits(self, job: Job, suspects: bool) -> bool:
        """Whether a waiting job may come, and share passes with those that are here."""
        if job.crashes and not suspects:
            return False
        if not self._slices:
            return True
        first = self._slices[0]
        if self._services.settings.packing == "off" or first.trainee is None or job.model != first.plan.model:
            return False
        spec = TrainSpec.from_json(job.spec or {})
        if _shape(spec) != _shape(first.plan.spec):
            return False
        if job.numeric_path:
            path = NumericPath.from_json(job.numeric_path)
        else:
            path = self._runtime.numeric_path(self._runtime.training_base(job.model, None), spec)
        taken = sum(one.rows for one in self._slices)
        return taken + min(spec.batch_size, path.micro_batch) <= self._row_limit and path.may_share(first.trainee.path)


def _rows(trainee: Trainee) -> int:
    """Of one forward pass."""
    return min(trainee.spec.batch_size, trainee.path.micro_batch)


def _shape(spec: TrainSpec) -> tuple[object, ...]:
    """What jobs of one pass must agree in."""
    return spec.layout, spec.gamma_depth, spec.gamma_places, spec.image_size
