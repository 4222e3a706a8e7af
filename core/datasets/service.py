"""Datasets: stored at once, validated by a worker, deleted only when no unfinished job needs them."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import Update

from core import faults, outbox
from core.datasets.repository import DatasetRepository
from core.db.leases import list_lost
from core.db.session import now, wrote
from core.errors import Conflict
from core.evaluations import service as evaluations
from core.ids import new_id
from core.jobs import service as jobs
from core.jobs.states import UNFINISHED
from core.models import Dataset, Job
from core.storage import keys
from core.tenants.admission import admit


@dataclass(frozen=True)
class ValidationPlan:
    """One claim of one dataset: what a worker needs, and the fence that its writes carry."""

    dataset_id: str
    tenant_id: str
    filename: str
    sha256: str
    object_key: str
    attempt: int


def new_dataset_id(tenant_id: str) -> tuple[str, str]:
    """An id and the key that its archive goes to: bytes are stored first, the row commits after."""
    dataset_id = new_id("file")
    return dataset_id, keys.archive(tenant_id, dataset_id)


def create_dataset(
    session: Session, tenant_id: str, dataset_id: str, *, filename: str, purpose: str, size: int, sha256: str
) -> Dataset:
    """Record an archive whose bytes are in the store, and ask for its validation. Raises Suspended."""
    admit(session, tenant_id)
    dataset = Dataset(
        id=dataset_id,
        tenant_id=tenant_id,
        filename=filename,
        purpose=purpose,
        bytes=size,
        sha256=sha256,
        object_key=keys.archive(tenant_id, dataset_id),
    )
    session.add(dataset)
    session.flush()
    outbox.put(session, "dataset.validate", dataset_id=dataset_id)
    return dataset


def delete_dataset(session: Session, tenant_id: str, dataset_id: str) -> Dataset:
    """Hide it now; upkeep removes its bytes. An unfinished job on it stands in the way."""
    dataset = DatasetRepository(session, tenant_id).get(dataset_id, lock=True)
    using = select(Job.id).where(Job.dataset_id == dataset.id, Job.status.in_(UNFINISHED)).limit(1)
    if job_id := session.scalar(using):
        raise Conflict(f"job {job_id} still needs this file: cancel it or let it end first", code="file_in_use")
    if evaluation_id := evaluations.find_using(session, dataset.id):
        raise Conflict(f"evaluation {evaluation_id} still needs this file: let it end first", code="file_in_use")
    dataset.deleted_at = now(session)
    faults.point("tombstoned")
    return dataset


def claim(session: Session, worker: str, lease_seconds: float) -> ValidationPlan | None:
    """The one that nobody validates and that was tried least, of these the oldest; or None.

    So what was put back, for whatever reason and however often, stands in nobody's way.
    """
    moment = now(session)
    waiting = _waiting()
    first = select(Dataset.id).where(*waiting).order_by(Dataset.attempt, Dataset.created_at).limit(1)
    first = first.with_for_update(skip_locked=True)
    taken = (
        update(Dataset)
        .where(Dataset.id == first.scalar_subquery(), *waiting)
        .values(attempt=Dataset.attempt + 1, lease_until=moment + timedelta(seconds=lease_seconds), worker=worker)
        .returning(Dataset)
    )
    row = session.scalar(taken)
    if row is None:
        return None
    return _plan(row)


def extend(session: Session, plan: ValidationPlan, lease_seconds: float) -> bool:
    until = now(session) + timedelta(seconds=lease_seconds)
    return wrote(session, _held(plan).values(lease_until=until))


def finish_validation(
    session: Session, plan: ValidationPlan, report: dict[str, Any], pack_key: str | None, report_key: str
) -> bool:
    """Write the verdict, and let the jobs that waited for it go on. False: another attempt has taken over."""
    values = {
        "status": report["status"],
        "status_details": report.get("detail"),
        "error_code": report.get("code"),
        "images": report.get("images"),
        "rejected": report.get("rejected"),
        "classes": report.get("classes"),
        "pack_key": pack_key,
        "pack_sha256": report.get("sha256"),
        "report_key": report_key,
        "lease_until": None,
    }
    if not wrote(session, _held(plan).values(**values)):
        return False
    dataset = session.get_one(Dataset, plan.dataset_id, populate_existing=True)
    jobs.dataset_settled(session, dataset)
    return True


def give_up(session: Session, plan: ValidationPlan, *, code: str, detail: str) -> bool:
    """The archive could not be read at all by us: an error of ours, said as such."""
    verdict = _held(plan).values(status="error", error_code=code, status_details=detail, lease_until=None)
    if not wrote(session, verdict):
        return False
    jobs.dataset_settled(session, session.get_one(Dataset, plan.dataset_id, populate_existing=True))
    return True


def release(session: Session, plan: ValidationPlan) -> None:
    """Let go, to be claimed again: the store or the machine failed or the worker shuts down, not the dataset."""
    session.execute(_held(plan).values(lease_until=None))


def interrupt(session: Session, plan: ValidationPlan, max_attempts: int) -> bool:
    """The process that read it was killed: counted as a lost worker is. False: another attempt has taken over."""
    mine = (*_by(plan), Dataset.lease_until.is_not(None))  # once, though a commit whose answer was lost is tried again
    held = select(Dataset).where(*mine).with_for_update().execution_options(populate_existing=True)
    dataset = session.scalar(held)
    if dataset is None:
        return False
    _count_crash(session, dataset, max_attempts)
    return True


def sweep(session: Session, max_attempts: int) -> bool:
    """Take back datasets whose lease ran out, and give up at the limit. True when any dataset waits for a worker."""
    for dataset in list_lost(session, Dataset, "uploaded"):
        _count_crash(session, dataset, max_attempts)
    return session.scalar(select(Dataset.id).where(*_waiting()).limit(1)) is not None


def _count_crash(session: Session, dataset: Dataset, max_attempts: int) -> None:
    """Back to those that wait, or given up at the limit: a dataset that kills whoever reads it must come to an end."""
    dataset.crashes += 1
    dataset.lease_until = None
    session.flush()
    if dataset.crashes >= max_attempts:
        detail = f"validation crashed {dataset.crashes} times"
        give_up(session, _plan(dataset), code="crashed", detail=detail)


def _waiting() -> tuple[ColumnElement[bool], ...]:
    """A lease that ran out waits for `sweep`, which counts it."""
    return Dataset.status == "uploaded", Dataset.deleted_at.is_(None), Dataset.lease_until.is_(None)


def _plan(row: Dataset) -> ValidationPlan:
    return ValidationPlan(row.id, row.tenant_id, row.filename, row.sha256, row.object_key, row.attempt)


def _held(plan: ValidationPlan) -> Update:
    return update(Dataset).where(*_by(plan))


def _by(plan: ValidationPlan) -> tuple[ColumnElement[bool], ...]:
    """The dataset, while this very attempt validates it."""
    return Dataset.id == plan.dataset_id, Dataset.status == "uploaded", Dataset.attempt == plan.attempt
