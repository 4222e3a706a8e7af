"""What a worker does with a job that it has claimed: write down how it goes, give it back, end it.

Every write carries its attempt in the WHERE: a late worker writes nothing.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import case, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import Update

from core import outbox
from core.db.session import now, wrote
from core.errors import DomainError
from core.evaluations import service as evaluations
from core.jobs.claims import Plan, Saved
from core.jobs.events import add_event
from core.jobs.states import Status, move
from core.models import Adapter, Checkpoint, Dataset, Job, JobMetric, Preview, Tenant


@dataclass(frozen=True)
class Standing:
    """What the database says to a worker that reports: go on, or stop for one of three reasons."""

    held: bool
    cancel: bool = False
    pause: bool = False

    @property
    def goes_on(self) -> bool:
        return self.held and not self.cancel and not self.pause


def fix_numeric_path(session: Session, plan: Plan, numeric_path: dict[str, Any]) -> bool:
    """Written once, at the first claim; a later attempt must keep to it."""
    if not wrote(session, _held(plan).where(Job.numeric_path.is_(None)).values(numeric_path=numeric_path)):
        return False
    rows = numeric_path.get("micro_batch", plan.spec.batch_size)
    if rows < plan.spec.batch_size:
        message = f"A batch of {plan.spec.batch_size} does not fit into memory: training in micro-batches of {rows}"
        add_event(session, plan.job_id, plan.tenant_id, message, data={"micro_batch": rows})
    return True


def halve_micro_batch(session: Session, plan: Plan, numeric_path: dict[str, Any], step: int) -> bool:
    """Memory ran out: from the checkpoint of `step` on, the job's path is another."""
    if not wrote(session, _held(plan).values(numeric_path=numeric_path)):
        return False
    rows = numeric_path["micro_batch"]
    message = f"Memory ran out: going on from step {step} in micro-batches of {rows}"
    add_event(session, plan.job_id, plan.tenant_id, message, level="warn", data={"step": step, "micro_batch": rows})
    return True


def extend(session: Session, plan: Plan, lease_seconds: float) -> bool:
    until = now(session) + timedelta(seconds=lease_seconds)
    return wrote(session, _held(plan).values(lease_until=until))


def report(
    session: Session, plan: Plan, *, step: int, progress: dict[str, Any], device_seconds: float, phase: str = "training"
) -> Standing:
    """Write progress down and learn whether to go on."""
    values = {"step": step, "progress": progress, "device_seconds": Job.device_seconds + device_seconds}
    mine = _held(plan).values(**values, phase=_unless_asked(phase), updated_at=now(session))
    asked = session.execute(mine.returning(Job.cancel_requested, Job.pause_requested)).one_or_none()
    if asked is None:
        return Standing(held=False)
    charge(session, plan.tenant_id, device_seconds)
    return Standing(held=True, cancel=asked[0], pause=asked[1])


def standing(session: Session, plan: Plan) -> Standing:
    """What `report` would say, without writing: cheap enough for every step."""
    asked = select(Job.cancel_requested, Job.pause_requested).where(
        Job.id == plan.job_id, Job.status == Status.running, Job.attempt == plan.attempt
    )
    row = session.execute(asked).one_or_none()
    return Standing(held=False) if row is None else Standing(held=True, cancel=row[0], pause=row[1])


def add_metric(session: Session, plan: Plan, step: int, data: dict[str, Any]) -> None:
    """One row a step: a resumed job that passes the step again writes nothing new."""
    known = select(JobMetric.id).where(JobMetric.job_id == plan.job_id, JobMetric.step == step)
    if not is_held(session, plan) or session.scalar(known) is not None:
        return
    session.add(JobMetric(job_id=plan.job_id, tenant_id=plan.tenant_id, step=step, data=data))
    total = data.get("total_steps", "?")
    message = f"Step {step}/{total}: training loss={data['train_loss']:.4f}"
    if data.get("valid_loss") is not None:
        message += f", validation loss={data['valid_loss']:.4f}"
    add_event(session, plan.job_id, plan.tenant_id, message, type="metrics", data={"step": step, **data})


def add_checkpoint(
    session: Session, plan: Plan, *, step: int, key: str, sha256: str, size: int, metrics: dict[str, Any]
) -> bool:
    """Point the job at it, in the transaction that records it. False: another attempt has taken over.

    Only a new checkpoint clears the count of crashes: a job that dies at the same step for ever must come to an end.
    """
    if not is_held(session, plan):
        return False
    known = select(Checkpoint).where(Checkpoint.job_id == plan.job_id, Checkpoint.step == step)
    checkpoint = session.scalar(known)
    crashes = 0 if checkpoint is None else Job.crashes
    if checkpoint is None:
        checkpoint = Checkpoint(job_id=plan.job_id, tenant_id=plan.tenant_id, step=step, metrics=metrics)
        session.add(checkpoint)
    checkpoint.object_key, checkpoint.sha256, checkpoint.bytes = key, sha256, size
    session.flush()
    return wrote(session, _held(plan).values(checkpoint_id=checkpoint.id, crashes=crashes))


def drop_checkpoint(session: Session, plan: Plan) -> Saved | None:
    """The job's checkpoint cannot be read: forget it and point to the one before, if there is one."""
    if not is_held(session, plan):
        return None
    job = session.get_one(Job, plan.job_id, populate_existing=True)
    if job.checkpoint_id is None:
        return None
    bad = session.get_one(Checkpoint, job.checkpoint_id)
    earlier = select(Checkpoint).where(Checkpoint.job_id == plan.job_id, Checkpoint.step < bad.step)
    previous = session.scalar(earlier.order_by(Checkpoint.step.desc()).limit(1))
    job.checkpoint_id = previous.id if previous else None
    session.delete(bad)
    add_event(session, job.id, job.tenant_id, f"Checkpoint of step {bad.step} is unreadable: going back", level="warn")
    return Saved.of(previous)


def add_preview(
    session: Session, plan: Plan, *, step: int, key: str, sha256: str, size: int, classes: list[str], seeds: list[int]
) -> bool:
    known = select(Preview.id).where(Preview.job_id == plan.job_id, Preview.step == step)
    if not is_held(session, plan) or session.scalar(known) is not None:
        return False
    preview = Preview(job_id=plan.job_id, tenant_id=plan.tenant_id, step=step, object_key=key)
    preview.sha256, preview.bytes, preview.classes, preview.seeds = sha256, size, classes, seeds
    session.add(preview)
    add_event(session, plan.job_id, plan.tenant_id, f"Preview drawn at step {step}", data={"step": step})
    return True


def yield_back(session: Session, plan: Plan) -> bool:
    """The slice is over and its checkpoint lies in the store: back to the queue, not a failure.

    A cancel or a pause that came after the last report is carried out here.
    """
    if not is_held(session, plan):
        return False
    asked = standing(session, plan)
    if not asked.goes_on:
        return stop(session, plan, asked)
    if not move(session, plan.job_id, Status.running, Status.queued, _mine(plan), phase="waiting"):
        return False
    outbox.put(session, "job.train", job_id=plan.job_id)
    return True


def stop(session: Session, plan: Plan, standing: Standing) -> bool:
    """Carry out the cancel or the pause that `report` told of."""
    target = Status.cancelled if standing.cancel else Status.paused
    if not move(session, plan.job_id, Status.running, target, _mine(plan), pause_requested=False, phase=None):
        return False
    add_event(session, plan.job_id, plan.tenant_id, f"Job {target}")
    return True


def finish(session: Session, plan: Plan, adapter: Adapter, metrics: dict[str, Any]) -> bool:
    """The adapter's row and the job's success are one transaction; a second one is refused by the unique job_id."""
    asked = _held(plan).where(Job.cancel_requested.is_(False))
    if not wrote(session, asked.values(phase="publishing")):
        return False
    session.add(adapter)
    session.flush()
    if not move(session, plan.job_id, Status.running, Status.succeeded, _mine(plan), adapter_id=adapter.id):
        raise RuntimeError(f"job {plan.job_id} moved inside its own transaction")
    add_event(session, plan.job_id, plan.tenant_id, f"New fine-tuned model created: {adapter.model}", data=metrics)
    add_event(session, plan.job_id, plan.tenant_id, "The job has successfully completed")
    _ask_for_evaluation(session, session.get_one(Job, plan.job_id, populate_existing=True), adapter)
    return True


def fail(session: Session, plan: Plan, *, code: str, message: str, param: str | None = None) -> bool:
    error = {"code": code, "message": message, "param": param}
    if not move(session, plan.job_id, Status.running, Status.failed, _mine(plan), error=error):
        return False
    add_event(session, plan.job_id, plan.tenant_id, f"Job failed: {message}", level="error")
    return True


def put_back(session: Session, plan: Plan, reason: str, max_crashes: int, code: str = "crashed") -> bool:
    """This attempt crashed: again from the last checkpoint, or failed by that code at the limit."""
    if not is_held(session, plan):
        return False
    return take_back(session, session.get_one(Job, plan.job_id, populate_existing=True), reason, max_crashes, code)


def is_held(session: Session, plan: Plan) -> bool:
    """Whether this attempt still stands. It then does until the transaction ends: PostgreSQL locks the row."""
    held = select(Job.id).where(Job.id == plan.job_id, Job.status == Status.running, Job.attempt == plan.attempt)
    return session.scalar(held.with_for_update(key_share=True)) is not None


def charge(session: Session, tenant_id: str, device_seconds: float) -> None:
    """Count device time against a tenant, for fairness."""
    session.execute(
        update(Tenant).where(Tenant.id == tenant_id).values(device_seconds=Tenant.device_seconds + device_seconds)
    )


def take_back(session: Session, job: Job, reason: str, max_crashes: int, code: str = "crashed") -> bool:
    """Cancelled if that was asked for, failed at the limit, else queued again from its last checkpoint."""
    mine = Job.attempt == job.attempt
    if job.cancel_requested:
        return move(session, job.id, Status.running, Status.cancelled, mine) and _said(session, job, "Job cancelled")
    if job.pause_requested:
        paused = move(session, job.id, Status.running, Status.paused, mine, pause_requested=False)
        return paused and _said(session, job, "Job paused")
    if job.crashes + 1 >= max_crashes:
        message = f"given up after {job.crashes + 1} crashes without progress: {reason}"
        error = {"code": code, "message": message, "param": None}
        failed = move(session, job.id, Status.running, Status.failed, mine, error=error)
        return failed and _said(session, job, f"Job failed: {message}", level="error")
    if not move(session, job.id, Status.running, Status.queued, mine, crashes=Job.crashes + 1, phase="waiting"):
        return False
    outbox.put(session, "job.train", job_id=job.id)
    return _said(
        session, job, f"Attempt {job.attempt} ended ({reason}); going on from the last checkpoint", level="warn"
    )


def _ask_for_evaluation(session: Session, job: Job, adapter: Adapter) -> None:
    """Where the job asked for it; a dataset that is too small to hold enough out is said, and costs nothing else."""
    if not job.evaluate:
        return
    try:
        evaluation = evaluations.evaluate_adapter(session, job, adapter, session.get_one(Dataset, job.dataset_id))
    except DomainError as error:
        add_event(session, job.id, job.tenant_id, f"Not evaluated: {error}", level="warn")
        return
    data = {"evaluation_id": evaluation.id}
    add_event(session, job.id, job.tenant_id, f"Evaluation queued: {evaluation.id}", data=data)


def _said(session: Session, job: Job, message: str, level: str = "info") -> bool:
    add_event(session, job.id, job.tenant_id, message, level=level)
    return True


def _mine(plan: Plan) -> Any:
    return Job.attempt == plan.attempt


def _held(plan: Plan) -> Update:
    """The job, while this very attempt runs it: a cancelled or re-claimed job stays untouched."""
    return update(Job).where(Job.id == plan.job_id, Job.status == Status.running, Job.attempt == plan.attempt)


def _unless_asked(phase: str) -> Any:
    """`cancelling` and `pausing` are not overwritten by a step that was under way."""
    return case((Job.cancel_requested, "cancelling"), (Job.pause_requested, "pausing"), else_=phase)
