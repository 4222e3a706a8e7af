"""One claimed job for one slice: prepared, stepped beside others, checkpointed, published or handed back."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch
from sqlalchemy.orm import Session

from core import faults
from core.adapters import format as adapter_format
from core.adapters import service as adapters
from core.db.session import DATABASE_AWAY
from core.diffusion.base import Base
from core.errors import DomainError, Unavailable
from core.ids import new_id
from core.jobs import attempts
from core.jobs.attempts import Standing
from core.jobs.claims import Plan
from core.models import Adapter as AdapterRow
from core.models import Tenant
from core.out_of_memory import halved, is_out_of_memory
from core.storage import keys
from core.training.crew import Crew
from core.training.data import TrainingData
from core.training.distributed import RankLost
from core.training.loop import finish
from core.training.memory import OutOfMemory
from core.training.path import NumericPath
from core.training.spec import TrainSpec
from core.training.trainee import Progress, Trainee, TrainState
from worker.checkpoints import Checkpoints, first_state
from worker.outages import DatabaseUnavailable, Patience
from worker.previews import Previews
from worker.runtime import Runtime, cpu_threads

log = structlog.get_logger()

_REPORT_SECONDS = 1.0
_READY_SECONDS = 0.05
_PREVIEW_SECONDS = 2.0  # that a job which leaves the device waits for pictures of it that are under way


@dataclass(eq=False)
class _Run:
    """A job that is prepared: `trainee` is live and moves with every step."""

    trainee: Trainee
    body: dict[str, Any]  # what the last step reported

    @property
    def path(self) -> NumericPath:
        return self.trainee.path

    @property
    def state(self) -> TrainState:
        return self.trainee.state

    @property
    def data(self) -> TrainingData:
        return self.trainee.data


class Slice:
    """Driven by the worker's `CoTraining`: prepared, then for each step asked for its trainee and told the outcome.

    Whatever goes wrong in a call ends this job's attempt and nothing else; `is_over` then.
    """

    def __init__(self, runtime: Runtime, plan: Plan) -> None:
        self.plan = plan
        self.is_over = False
        self._runtime = runtime
        self._services = runtime.services
        self._run: _Run | None = None
        self._reported = time.monotonic()
        self._unpaid = 0.0  # device seconds not yet charged
        self._rate = 0.0  # steps per second, smoothed
        self._failed_at_one = False  # whether memory ran out at a micro-batch of one row
        self._transactions = runtime.transactions
        self._checkpoints = Checkpoints(runtime, plan)
        self._owes_checkpoint = False
        self._store = Patience()
        self._previews = Previews(runtime, plan)
        self._crew: Crew | None = None  # the other processes of a job on several devices

    @property
    def trainee(self) -> Trainee | None:
        """Once it is prepared."""
        return None if self._run is None else self._run.trainee

    @property
    def rows(self) -> int:
        """Of one forward pass."""
        batch, path = self.plan.spec.batch_size, self.plan.numeric_path
        return batch if path is None else min(batch, path["micro_batch"])

    def prepare(self) -> None:
        """Dataset to latents, checkpoint to state. The numeric path is written down before the first step ever.

        A job on several devices is not prepared yet when this returns, while the others still load their base: ask
        again. Sampling goes on in between.
        """
        with self._attempt():
            standing = self._standing()
            if not standing.goes_on:
                self._stop(standing)
                return
            self._crew = self._crew or self._runtime.crew(self.plan)
            if self._crew is not None and not self._crew.is_ready(_READY_SECONDS):
                return
            began = time.monotonic()
            spec, fixed = self.plan.spec, self.plan.numeric_path
            base = self._runtime.training_base(self.plan.model, fixed)
            with cpu_threads(fixed["threads"] if fixed else torch.get_num_threads()):
                data = self._runtime.prepared(self.plan)
                faults.point("dataset_loaded")
                path = self._fix_path(base, data, spec)
                found = self._checkpoints.load(base, data, path)
                state = found[0] if found else first_state(self._runtime, base, data, self.plan)
                if self._crew is not None:
                    self._crew.join(data, spec, state, path)
            body = dict(found[1].metrics) if found else {}
            self._run = _Run(Trainee(base, data, spec, state, path, self._crew), body)
            self._unpaid += time.monotonic() - began
            self._runtime.rest.end()

    def ready(self) -> Trainee | None:
        """The trainee for its next step; None when there is none: the job has ended, or waits to be published."""
        with self._attempt():
            run = self._prepared
            self._previews.harvest(run.data.classes)
            if run.state.step < self.plan.spec.steps:
                return run.trainee
            if self._store.is_due:
                standing = self._standing()  # it may have waited for its store
                if standing.cancel or not standing.held:
                    self._stop(standing)
                else:
                    self._publish(run)
        return None

    def took(self, outcome: Progress | Exception, device_seconds: float) -> None:
        """What came of the step, and how much of the device's time it was."""
        with self._attempt():
            self._unpaid += device_seconds * self.plan.spec.devices
            if isinstance(outcome, Exception):
                raise outcome
            faults.point("after_step")
            self._seen(self._prepared, outcome)

    def extend(self, session: Session, lease_seconds: float) -> None:
        attempts.extend(session, self.plan, lease_seconds)

    def hand_back(self, at_once: bool = True) -> None:
        """The worker wants the device: checkpoint and go back to the queue, unless nothing is left but to publish.

        Where it need not be `at_once` and the store refuses, the job is not over yet: it goes on, and is asked again.
        """
        if not at_once and not self._store.is_due:
            return
        with self._attempt():
            run = self._run
            if run is not None and run.state.step == self.plan.spec.steps:
                self._publish(run, at_once)
                return
            if run is not None:
                if not self._keep(run) and self._store.is_left and not at_once:
                    return
                self._previews.harvest(run.data.classes, _PREVIEW_SECONDS)
            self._hand_back()

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Every way in which an attempt may end is decided here."""
        with structlog.contextvars.bound_contextvars(
            tenant_id=self.plan.tenant_id, job_id=self.plan.job_id, attempt=self.plan.attempt
        ):
            try:
                yield
            except OutOfMemory as error:
                self._fail(error.code, str(error))
            except (Unavailable, *DATABASE_AWAY) as error:
                log.warning("job.postponed", error=str(error))
                self._runtime.rest.begin()
                self._hand_back()
            except DomainError as error:
                self._fail(error.code, str(error))
            except Exception as error:
                if is_out_of_memory(error):
                    self._halve_micro_batch()
                    return
                log.exception("job.crashed")
                self._put_back(str(error) if isinstance(error, RankLost) else type(error).__name__)

    @property
    def _prepared(self) -> _Run:
        if self._run is None:
            raise RuntimeError("the slice is not prepared")
        return self._run

    def _fix_path(self, base: Base, data: TrainingData, spec: TrainSpec) -> NumericPath:
        """The job's own numeric path where an earlier claim fixed one; else this machine's, its micro-batch tried."""
        here, fixed = self._runtime.numeric_path(base, spec), self.plan.numeric_path
        if fixed is None:
            path = replace(here, micro_batch=self._runtime.micro_batch(base, data, spec))
            told = path.to_json()
            self._transactions.write(lambda session: attempts.fix_numeric_path(session, self.plan, told))
            self.plan = replace(self.plan, numeric_path=told)
            return path
        path = NumericPath.from_json(fixed)
        if replace(path, micro_batch=here.micro_batch) != here:
            log.warning("job.numeric_path_changed", fixed=fixed, here=here.to_json())
        return path

    def _halve_micro_batch(self) -> None:
        """Memory ran out: again from the last checkpoint, which is read anew, in smaller parts.

        Before there is a trainee they are no help: what it takes to make one has room another time, or never.
        """
        if self._run is None:
            self._put_back("memory ran out before its next step", OutOfMemory.code)
            return
        rows = self.rows
        if rows == 1 and self._failed_at_one:
            self._fail(OutOfMemory.code, "a training step does not fit into the memory of this device any more")
            return
        self._failed_at_one = rows == 1
        path = replace(self._run.path, micro_batch=halved(rows)).to_json()
        log.warning("job.memory_ran_out", micro_batch=path["micro_batch"])
        step = self._checkpoints.resumes_at
        try:
            held = self._transactions.write(lambda session: attempts.halve_micro_batch(session, self.plan, path, step))
        except DatabaseUnavailable:
            held = False  # and its lease brings it back
        if not held:
            self._end()
        self.plan = replace(self.plan, numeric_path=path)
        self._run = None
        self._leave_crew()

    def _seen(self, run: _Run, progress: Progress) -> None:
        """After a step: report, checkpoint, preview, and stop where that was asked for."""
        spec, step = self.plan.spec, progress.step
        self._rate = 1 / progress.seconds if self._rate == 0 else 0.9 * self._rate + 0.1 / progress.seconds
        run.body = self._body(progress, run.body)
        is_measured = step % spec.metrics_every == 0 or progress.val_loss is not None or step == spec.steps
        if is_measured or time.monotonic() - self._reported >= _REPORT_SECONDS:
            standing = self._report(run, progress, is_measured)
        else:
            standing = self._standing()
        if not standing.goes_on:
            self._stop(standing)
            return
        self._owes_checkpoint |= step % spec.checkpoint_every == 0
        if self._owes_checkpoint and step < spec.steps and self._store.is_due:
            self._keep(run)
        if spec.preview_every and (step % spec.preview_every == 0 or step == spec.steps):
            self._previews.draw(run.trainee)

    def _standing(self) -> Standing:
        return self._transactions.read(lambda session: attempts.standing(session, self.plan))

    def _report(self, run: _Run, progress: Progress, is_measured: bool) -> Standing:
        def report(session: Session) -> Standing:
            standing = attempts.report(
                session, self.plan, step=progress.step, progress=run.body, device_seconds=self._unpaid
            )
            if standing.held and is_measured:
                metric = {**run.body, "valid_loss": progress.val_loss}
                attempts.add_metric(session, self.plan, progress.step, metric)
            return standing

        standing = self._transactions.write(report)
        self._reported, self._unpaid = time.monotonic(), 0.0
        return standing

    def _body(self, progress: Progress, before: Mapping[str, Any]) -> dict[str, Any]:
        """Progress as the job shows it; the validation loss is the last one that was measured."""
        spec = self.plan.spec
        return {
            "step": progress.step,
            "total_steps": spec.steps,
            "train_loss": progress.loss,
            "valid_loss": before.get("valid_loss") if progress.val_loss is None else progress.val_loss,
            "grad_norm": progress.grad_norm,
            "learning_rate": progress.learning_rate,
            "steps_per_second": round(self._rate, 3),
            "eta_seconds": round((spec.steps - progress.step) / self._rate, 1),
        }

    def _stop(self, standing: Standing) -> None:
        """Cancelled, paused, or taken over by another worker. A pause waits for a store that refuses its checkpoint."""
        run = self._run
        if standing.held and standing.pause and not standing.cancel and run is not None:
            is_kept = self._store.is_due and self._keep(run)
            if not is_kept and self._store.is_left:
                return
            self._previews.harvest(run.data.classes, _PREVIEW_SECONDS)
        self._leave(lambda session: standing.held and attempts.stop(session, self.plan, standing))

    def _keep(self, run: _Run) -> bool:
        """Save a checkpoint. False where the store refuses: training goes on, and it is asked again after a while."""
        if self._checkpoints.step == run.state.step:
            return True
        self._verify(run)
        try:
            self._checkpoints.save(run.trainee, run.path, _losses(run.body))
        except Unavailable as error:
            log.warning("job.checkpoint_postponed", error=str(error))
            self._store.refused()
            return False
        self.plan = replace(self.plan, crashes=0)  # as `add_checkpoint` has it
        self._owes_checkpoint = False
        self._store.answered()
        return True

    def _verify(self, run: _Run) -> None:
        """What is kept is what every process of the job has."""
        if self._crew is not None:
            self._crew.verify(run.state)

    # --- ends

    def _publish(self, run: _Run, at_once: bool = False) -> None:
        """Bytes, then row and success in one transaction.

        A store that refuses the bytes is asked again for as long as there is patience, unless it must be `at_once`.
        """
        self._verify(run)
        self._previews.harvest(run.data.classes, math.inf)
        base, plan = run.trainee.base, self.plan
        metrics = _losses(run.body)
        adapter = finish(run.state, base, plan.spec, run.data, metrics)
        data = adapter_format.save(adapter)
        digest = hashlib.sha256(data).hexdigest()
        adapter_id = new_id("adapter")
        key = keys.adapter(plan.tenant_id, adapter_id, digest)
        faults.point("final_put")
        try:
            self._services.store.put(key, data)
        except Unavailable as error:
            self._store.refused()
            if at_once or not self._store.is_left:
                raise
            log.warning("job.publishing_postponed", error=str(error))
            return
        faults.point("before_succeeded")

        def publish(session: Session) -> bool:
            tenant = session.get_one(Tenant, plan.tenant_id)
            row = AdapterRow(
                id=adapter_id,
                tenant_id=plan.tenant_id,
                job_id=plan.job_id,
                model=adapters.model_name(tenant, plan.model, plan.suffix, adapter_id),
                base=plan.model,
                base_fingerprint=base.fingerprint,
                object_key=key,
                sha256=digest,
                bytes=len(data),
                parameters=adapter.parameter_count,
                base_parameters=base.summary.parameters,
                image_size=plan.spec.image_size,
                layout={"kind": adapter.layout.kind, **adapter.layout.options.to_json()},
                classes=list(adapter.classes),
                metrics=metrics,
            )
            published = attempts.finish(session, plan, row, metrics)
            self._charge(session)
            return published

        if self._transactions.write(publish):
            faults.point("after_succeeded_before_ack")
            log.info("job.succeeded", adapter_id=adapter_id, sha256=digest, bytes=len(data))
            self._services.nudges.announce(plan.job_id)
            self._end()
        else:  # a cancel came first, or another worker has it
            self._stop(self._standing())

    def _fail(self, code: str, message: str) -> None:
        self._leave(lambda session: attempts.fail(session, self.plan, code=code, message=message))
        self._services.nudges.announce(self.plan.job_id)

    def _put_back(self, reason: str, code: str = "crashed") -> None:
        most = self._services.settings.max_attempts
        self._leave(lambda session: attempts.put_back(session, self.plan, reason, most, code))
        self._services.nudges.rouse()

    def _hand_back(self) -> None:
        self._leave(lambda session: attempts.yield_back(session, self.plan))
        self._services.nudges.rouse()

    def _leave(self, last: Callable[[Session], object]) -> None:
        self._transactions.write_last(last, self._charge)
        self._end()

    def _charge(self, session: Session) -> None:
        attempts.charge(session, self.plan.tenant_id, self._unpaid)

    def _end(self) -> None:
        self._previews.drop()
        self._leave_crew()
        self.is_over = True

    def _leave_crew(self) -> None:
        if self._crew is not None:
            self._crew.leave()
            self._crew = None


def _losses(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name.endswith("_loss")}
