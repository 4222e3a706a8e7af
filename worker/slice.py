"""One claimed job for one slice: prepared, stepped beside others, checkpointed, published or handed back."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch
from sqlalchemy.orm import Session

from core import faults
from core.adapters import format as adapter_format
from core.adapters import service as adapters
from core.diffusion.base import Base
from core.errors import DomainError, Unavailable
from core.ids import new_id
from core.jobs import attempts
from core.jobs.attempts import Plan, Standing
from core.models import Adapter as AdapterRow
from core.models import Tenant
from core.storage import keys
from core.training.crew import Crew
from core.training.data import TrainingData
from core.training.distributed import RankLost
from core.training.loop import Progress, Trainee, TrainState, finish
from core.training.memory import OutOfMemory, halved, is_out_of_memory
from core.training.spec import TrainSpec
from worker.checkpoints import Checkpoints, first_state
from worker.previews import Previews
from worker.runtime import Runtime, cpu_threads, retried

log = structlog.get_logger()

_REPORT_SECONDS = 1.0
_READY_SECONDS = 0.05


@dataclass(eq=False)
class _Run:
    """A job that is prepared: `trainee` is live and moves with every step."""

    trainee: Trainee
    path: Mapping[str, Any]
    body: dict[str, Any]  # what the last step reported

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
        self._checkpoints = Checkpoints(runtime.services, plan)
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
                state = found[0] if found else first_state(self._services.store, base, data, self.plan)
                if self._crew is not None:
                    self._crew.join(data, spec, state, path)
            body = dict(found[1].metrics) if found else {}
            self._run = _Run(Trainee(base, data, spec, state, path, self._crew), path, body)
            self._unpaid += time.monotonic() - began

    def ready(self) -> Trainee | None:
        """The trainee for its next step; None when there is none, because the job has ended one way or another."""
        with self._attempt():
            run = self._prepared
            self._previews.harvest(run.data.classes)
            if run.state.step < self.plan.spec.steps:
                return run.trainee
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

    def hand_back(self) -> None:
        """The worker wants the device: checkpoint and go back to the queue, unless nothing is left but to publish."""
        with self._attempt():
            if self._run is not None and self._run.state.step == self.plan.spec.steps:
                self._publish(self._run)
                return
            try:
                if self._run is not None and self._checkpoints.step != self._run.state.step:
                    self._save_checkpoint(self._run)
            except Unavailable as error:
                log.warning("job.checkpoint_postponed", error=str(error))
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
            except Unavailable as error:
                log.warning("job.postponed", error=str(error))
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

    def _fix_path(self, base: Base, data: TrainingData, spec: TrainSpec) -> dict[str, Any]:
        """The job's own numeric path where an earlier claim fixed one; else this machine's, its micro-batch tried."""
        here, path = self._runtime.numeric_path(base, spec), self.plan.numeric_path
        if path is None:
            path = {**here, "micro_batch": self._runtime.micro_batch(base, data, spec)}
            with self._services.database.write() as session:
                attempts.fix_numeric_path(session, self.plan, path)
            self.plan = replace(self.plan, numeric_path=path)
        elif {**path, "micro_batch": 0} != {**here, "micro_batch": 0}:
            log.warning("job.numeric_path_changed", fixed=path, here=here)
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
        path = {**self._run.path, "micro_batch": halved(rows)}
        log.warning("job.memory_ran_out", micro_batch=path["micro_batch"])
        with self._services.database.write() as session:
            if not attempts.halve_micro_batch(session, self.plan, path, self._checkpoints.resumes_at):
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
        if step % spec.checkpoint_every == 0 and step < spec.steps:
            self._save_checkpoint(run)
        if spec.preview_every and (step % spec.preview_every == 0 or step == spec.steps):
            self._previews.draw(run.trainee)

    def _standing(self) -> Standing:
        with self._services.database.read() as session:
            return attempts.standing(session, self.plan)

    def _report(self, run: _Run, progress: Progress, is_measured: bool) -> Standing:
        with self._services.database.write() as session:
            standing = attempts.report(
                session, self.plan, step=progress.step, progress=run.body, device_seconds=self._unpaid
            )
            if standing.held and is_measured:
                metric = {**run.body, "valid_loss": progress.val_loss}
                attempts.add_metric(session, self.plan, progress.step, metric)
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
        """Cancelled, paused, or taken over by another worker."""
        if standing.held and standing.pause and not standing.cancel and self._run is not None:
            self._save_checkpoint(self._run)
        with self._services.database.write() as session:
            if standing.held:
                attempts.stop(session, self.plan, standing)
            self._charge(session)
        self._end()

    def _save_checkpoint(self, run: _Run) -> None:
        self._verify(run)
        self._checkpoints.save(run.trainee, run.path, _losses(run.body))

    def _verify(self, run: _Run) -> None:
        """What is kept is what every process of the job has."""
        if self._crew is not None:
            self._crew.verify(run.state)

    # --- ends

    def _publish(self, run: _Run) -> None:
        """Bytes, then row and success in one transaction."""
        self._verify(run)
        self._previews.harvest(run.data.classes, wait=True)
        base, plan = run.trainee.base, self.plan
        metrics = _losses(run.body)
        adapter = finish(run.state, base, plan.spec, run.data, metrics)
        data = adapter_format.save(adapter)
        digest = hashlib.sha256(data).hexdigest()
        adapter_id = new_id("adapter")
        key = keys.adapter(plan.tenant_id, adapter_id, digest)
        faults.point("final_put")
        retried(lambda: self._services.store.put(key, data))
        faults.point("before_succeeded")
        with self._services.database.write() as session:
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
        if published:
            faults.point("after_succeeded")
            log.info("job.succeeded", adapter_id=adapter_id, sha256=digest, bytes=len(data))
            self._services.nudges.announce(plan.job_id)
            self._end()
        else:  # a cancel came first, or another worker has it
            self._stop(self._standing())

    def _fail(self, code: str, message: str) -> None:
        with self._services.database.write() as session:
            attempts.fail(session, self.plan, code=code, message=message)
            self._charge(session)
        self._services.nudges.announce(self.plan.job_id)
        self._end()

    def _put_back(self, reason: str, code: str = "crashed") -> None:
        with self._services.database.write() as session:
            attempts.put_back(session, self.plan, reason, self._services.settings.max_attempts, code)
            self._charge(session)
        self._services.nudges.rouse()
        self._end()

    def _hand_back(self) -> None:
        with self._services.database.write() as session:
            attempts.yield_back(session, self.plan)
            self._charge(session)
        self._services.nudges.rouse()
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
