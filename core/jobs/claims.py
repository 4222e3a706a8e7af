"""How a worker comes by a job: it takes the first in the order of `core.jobs.queue` that it can."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.bases import Catalog
from core.db.session import now
from core.diffusion.catalog import BaseSummary
from core.errors import Conflict, DomainError
from core.jobs.events import add_event
from core.jobs.queue import waiting_ids
from core.jobs.service import resolve_on
from core.jobs.start import Start
from core.jobs.states import Status, move
from core.models import Checkpoint, Dataset, Job
from core.training import hyperparameters
from core.training.path import NumericPath
from core.training.spec import MAX_STEPS, TrainSpec
from core.unread import Unread

_LOOKED_AT = 50
"""Jobs at the head of the queue among which a worker looks for one that it can take."""

_UNREAD = Unread("job")


@dataclass(frozen=True)
class Plan:
    """One claim of one job: what a worker needs, and the fence that its writes carry."""

    job_id: str
    tenant_id: str
    attempt: int
    crashes: int  # of workers, since its last checkpoint
    model: str
    suffix: str | None
    spec: TrainSpec
    pack_key: str
    pack_sha256: str
    numeric_path: dict[str, Any] | None
    checkpoint: "Saved | None"
    start: Start | None


@dataclass(frozen=True)
class Saved:
    """A checkpoint in the store, and the losses at its step."""

    key: str
    sha256: str
    metrics: dict[str, Any]

    @classmethod
    def of(cls, row: Checkpoint | None) -> "Saved | None":
        return None if row is None else cls(row.object_key, row.sha256, row.metrics)


def claim(
    session: Session,
    worker: str,
    lease_seconds: float,
    catalog: Catalog,
    fits: Callable[[Job], bool] | None = None,
    devices: int = 1,
    max_steps: int = MAX_STEPS,
) -> Plan | None:
    """Take the next job in the order of `core.jobs.queue` that asks for no more than so many devices.

    With `fits`, the first that fits beside what is running. A job whose dataset was not known when it was created may
    have no more than `max_steps`, as then. What another release wrote and this one cannot read stays in the queue.
    """
    for job_id in _looked_at(session, catalog, devices):
        # Skipped where another worker looks at it, or has taken it since.
        one = select(Job).where(Job.id == job_id, Job.status == Status.queued).with_for_update(skip_locked=True)
        job = session.scalar(one.execution_options(populate_existing=True))
        read = None if job is None else _UNREAD.read(job.id, lambda job=job: _Read.of(job))
        if job is None or read is None:
            continue
        try:
            spec = _make_ready(session, job, read, catalog.get(job.model), max_steps)
        except DomainError as error:
            _fail_queued(session, job, error)
            continue
        if fits is not None and not fits(job):
            continue
        moment = now(session)
        taken = move(
            session,
            job.id,
            Status.queued,
            Status.running,
            attempt=Job.attempt + 1,
            lease_until=moment + timedelta(seconds=lease_seconds),
            worker=worker,
            phase="preparing",
            started_at=func.coalesce(Job.started_at, moment),
        )
        if taken:
            return _plan(session, job, spec, read.start)
    return None


def is_waiting(session: Session, catalog: Catalog, fits: Callable[[Job], bool] | None = None, devices: int = 1) -> bool:
    """Cheap enough to ask between steps. With `fits`, whether `claim` would find one, unless somebody is quicker."""
    if fits is None:
        waiting = select(Job.id).where(Job.status == Status.queued, Job.model.in_(catalog.names()))
        waiting = waiting.where(Job.devices <= devices, Job.id.not_in(_UNREAD.ids()))
        return session.scalar(waiting.limit(1)) is not None
    looked_at = _looked_at(session, catalog, devices)
    found = session.scalars(select(Job).where(Job.id.in_(looked_at))).all()
    readable = [job for job in found if _UNREAD.read(job.id, lambda job=job: _Read.of(job)) is not None]
    # What no spec says yet is found out by claiming it.
    return any(job.spec is None or fits(job) for job in readable)


def _looked_at(session: Session, catalog: Catalog, devices: int) -> list[str]:
    """The head of the queue, without what this process cannot read."""
    unread = set(_UNREAD.ids())
    waiting = waiting_ids(session, catalog.names(), _LOOKED_AT + len(unread), devices)
    return [job_id for job_id in waiting if job_id not in unread]


@dataclass(frozen=True)
class _Read:
    """What a queued job says of itself."""

    spec: TrainSpec | None  # None before its dataset is known
    start: Start | None

    @classmethod
    def of(cls, job: Job) -> "_Read":
        """Raises what `Unread` takes for another release's, of anything that a worker will read."""
        if job.spec is None and not hyperparameters.are_known(job.request):
            raise ValueError("hyperparameters that this release does not have")
        if job.numeric_path is not None:
            NumericPath.from_json(job.numeric_path)
        spec = None if job.spec is None else TrainSpec.from_json(job.spec)
        return cls(spec, None if job.start is None else Start.from_json(job.start))


def _make_ready(session: Session, job: Job, read: _Read, base: BaseSummary, max_steps: int) -> TrainSpec:
    """Its spec, written down where it was created before its dataset was known. Raises what it cannot be run for."""
    if job.base_fingerprint != base.fingerprint:
        message = f"the base {base.name} has changed since this job was created: create it again"
        raise Conflict(message, code="base_changed", pointer="/model")
    if read.spec is not None:
        return read.spec
    spec = resolve_on(job.request, session.get_one(Dataset, job.dataset_id), base, job.seed, max_steps)
    job.spec = spec.to_json()
    session.flush()
    return spec


def _plan(session: Session, job: Job, spec: TrainSpec, start: Start | None) -> Plan:
    """What was just claimed."""
    session.refresh(job)
    if job.attempt == 1:
        add_event(session, job.id, job.tenant_id, "Fine-tuning job started")
    dataset = session.get_one(Dataset, job.dataset_id)
    checkpoint = session.get(Checkpoint, job.checkpoint_id) if job.checkpoint_id else None
    return Plan(
        job_id=job.id,
        tenant_id=job.tenant_id,
        attempt=job.attempt,
        crashes=job.crashes,
        model=job.model,
        suffix=job.suffix,
        spec=spec,
        pack_key=dataset.pack_key or "",
        pack_sha256=dataset.pack_sha256 or "",
        numeric_path=job.numeric_path,
        checkpoint=Saved.of(checkpoint),
        start=start,
    )


def _fail_queued(session: Session, job: Job, error: DomainError) -> None:
    body = {"code": error.code, "message": str(error), "param": error.param}
    if move(session, job.id, Status.queued, Status.failed, error=body):
        add_event(session, job.id, job.tenant_id, f"Job failed: {error}", level="error")
