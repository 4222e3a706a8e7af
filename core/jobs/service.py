"""What a tenant does with a fine-tuning job: create, cancel, pause, resume. And what its dataset's verdict does."""

from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from core import faults
from core.datasets.repository import DatasetRepository
from core.db.session import wrote
from core.diffusion.catalog import BaseSummary
from core.errors import Conflict, OverQuota
from core.jobs.events import add_event, announce_queued
from core.jobs.repository import JobRepository
from core.jobs.start import Start
from core.jobs.states import TERMINAL, UNFINISHED, Status, move
from core.models import Dataset, Job, Tenant
from core.tenants.admission import admit
from core.training.hyperparameters import MAX_DEVICES
from core.training.spec import MAX_STEPS, TrainSpec, resolve


def create_job(
    session: Session,
    tenant_id: str,
    base: BaseSummary,
    *,
    dataset_id: str,
    hyperparameters: dict[str, Any],
    suffix: str | None = None,
    seed: int = 0,
    labels: dict[str, str] | None = None,
    evaluate: bool = False,
    start: Start | None = None,
    max_queued: int = 100,
    max_steps: int = MAX_STEPS,
    max_devices: int = MAX_DEVICES,
) -> Job:
    """Queue a fine-tune on one of the tenant's own datasets.

    Raises NotFound, Conflict, Invalid, OverQuota or Suspended.
    """
    if start is not None:
        start.require_base(base)
        hyperparameters = start.hyperparameters(hyperparameters)
    # Locked: its verdict must not arrive, nor it be deleted, between this look and our commit.
    dataset = DatasetRepository(session, tenant_id).get(dataset_id, pointer="/training_file", lock=True)
    if dataset.status == "error":
        raise Conflict(
            f"file {dataset.id} failed validation ({dataset.error_code}): {dataset.status_details}",
            code="file_not_usable",
            pointer="/training_file",
        )
    _admit(session, tenant_id, max_queued)
    # Bounds are checked now even where the dataset is not known yet: nothing bad is accepted.
    spec = resolve_on(hyperparameters, dataset, base, seed, max_steps, max_devices)
    if start is not None:
        start.require_layout(spec)
    ready = dataset.status == "processed"
    job = Job(
        tenant_id=tenant_id,
        dataset_id=dataset.id,
        model=base.name,
        base_fingerprint=base.fingerprint,
        suffix=suffix,
        seed=seed,
        request=hyperparameters,
        spec=spec.to_json() if ready else None,
        start=start.to_json() if start else None,
        devices=spec.devices,
        labels=labels or {},
        evaluate=evaluate,
        status=Status.queued if ready else Status.validating_files,
    )
    session.add(job)
    session.flush()
    add_event(session, job.id, tenant_id, f"Created fine-tuning job: {job.id}")
    if start is not None:
        add_event(
            session, job.id, tenant_id, f"Continuing from {start.kind} {start.id}", data={f"{start.kind}_id": start.id}
        )
    if ready:
        announce_queued(session, job.id, tenant_id)
    else:
        add_event(session, job.id, tenant_id, f"Validating training file: {dataset.id}")
    return job


def dataset_settled(session: Session, dataset: Dataset) -> None:
    """Jobs that waited for this dataset's validation are queued, or fail with its reason, paused ones too."""
    waiting = select(Job).where(Job.dataset_id == dataset.id, Job.status.in_((Status.validating_files, Status.paused)))
    for job in session.scalars(waiting.with_for_update()).all():
        if dataset.status == "error":
            error = {
                "code": "invalid_training_file",
                "message": f"{dataset.error_code}: {dataset.status_details}",
                "param": "training_file",
            }
            if move(session, job.id, Status(job.status), Status.failed, error=error):
                add_event(session, job.id, job.tenant_id, error["message"], level="error")
        elif job.status == Status.validating_files and move(session, job.id, Status.validating_files, Status.queued):
            announce_queued(session, job.id, job.tenant_id)


def cancel_job(session: Session, tenant_id: str, job_id: str) -> Job:
    """At once where no worker holds it; else the worker stops at its next step."""
    job = JobRepository(session, tenant_id).get(job_id, lock=True)
    for waiting in (Status.validating_files, Status.queued, Status.paused):
        if move(session, job.id, waiting, Status.cancelled, cancel_requested=True):
            add_event(session, job.id, tenant_id, "Job cancelled")
            return _fresh(session, job)
    _ask(session, job, "cancelled", cancel_requested=True, phase="cancelling")
    faults.point("flag_set")
    return _fresh(session, job)


def pause_job(session: Session, tenant_id: str, job_id: str) -> Job:
    """Keep its checkpoint and give the device away until `resume_job`."""
    job = JobRepository(session, tenant_id).get(job_id, lock=True)
    if job.status == Status.paused:
        return job
    for waiting in (Status.validating_files, Status.queued):
        if move(session, job.id, waiting, Status.paused):
            add_event(session, job.id, tenant_id, "Job paused")
            return _fresh(session, job)
    phase = "cancelling" if job.cancel_requested else "pausing"
    _ask(session, job, "paused", pause_requested=True, phase=phase)
    return _fresh(session, job)


def resume_job(session: Session, tenant_id: str, job_id: str) -> Job:
    """Back to the queue, to go on from its last checkpoint; a pause that is not carried out yet is taken back."""
    found = JobRepository(session, tenant_id).get(job_id)
    # The dataset before the job, as everywhere: two locks in two orders would be a deadlock.
    dataset = session.get_one(Dataset, found.dataset_id, with_for_update={"key_share": True}, populate_existing=True)
    job = JobRepository(session, tenant_id).get(job_id, lock=True)
    asked = (Job.id == job.id, Job.status == Status.running, Job.pause_requested, Job.cancel_requested.is_(False))
    if wrote(session, update(Job).where(*asked).values(pause_requested=False, phase="training")):
        return _fresh(session, job)
    target = Status.validating_files if dataset.status == "uploaded" else Status.queued
    if move(session, job.id, Status.paused, target, pause_requested=False):
        add_event(session, job.id, tenant_id, "Job resumed")
        if target == Status.queued:
            announce_queued(session, job.id, tenant_id)
        return _fresh(session, job)
    raise Conflict(f"job {job.id} is {job.status}: only a paused job resumes", code="job_not_paused")


def resolve_on(
    hyperparameters: dict[str, Any],
    dataset: Dataset,
    base: BaseSummary,
    seed: int,
    max_steps: int = MAX_STEPS,
    max_devices: int = MAX_DEVICES,
) -> TrainSpec:
    counts = [item["count"] for item in dataset.classes or []] or [2]
    return resolve(
        hyperparameters,
        images=sum(counts),
        classes=len(counts),
        base=base,
        seed=seed,
        max_steps=max_steps,
        max_devices=max_devices,
    )


def _admit(session: Session, tenant_id: str, max_queued: int) -> None:
    """Check the quota, and let a tenant that comes back start level with those who work now.

    Else a tenant that slept for a week would own the device until it had caught up (start-time fair queueing).
    """
    admit(session, tenant_id)
    unfinished = select(func.count()).select_from(Job).where(Job.tenant_id == tenant_id, Job.status.in_(UNFINISHED))
    count = session.scalar(unfinished) or 0
    if count >= max_queued:
        raise OverQuota(f"{count} jobs are unfinished, the most that this tenant may have", code="too_many_jobs")
    if count == 0:
        active = select(Job.tenant_id).where(Job.status.in_((Status.queued, Status.running)))
        level = session.scalar(select(func.min(Tenant.device_seconds)).where(Tenant.id.in_(active))) or 0.0
        behind = (Tenant.id == tenant_id, Tenant.device_seconds < level)
        session.execute(update(Tenant).where(*behind).values(device_seconds=level))


def _ask(session: Session, job: Job, verb: str, **values: Any) -> None:
    """Set a flag on a job that a worker runs; Conflict when it has ended."""
    running = update(Job).where(Job.id == job.id, Job.status == Status.running)
    if wrote(session, running.values(**values)):
        return
    session.refresh(job)
    if job.status in TERMINAL:
        raise Conflict(f"job {job.id} is {job.status} already: it cannot be {verb}", code="job_ended")
    raise Conflict(f"job {job.id} is just changing: ask again", code="job_moving", retry_after_seconds=1)


def _fresh(session: Session, job: Job) -> Job:
    session.refresh(job)
    return job
