"""A tenant that is locked out, or leaves: its work stops, and its bytes go."""

from contextlib import suppress

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from core.db.session import Database, now
from core.errors import Conflict
from core.evaluations import service as evaluations
from core.jobs import service as jobs
from core.jobs.states import UNFINISHED
from core.models import Adapter, ApiKey, Checkpoint, Dataset, Evaluation, IdempotencyKey, Job, Preview, Sample, Tenant
from core.samples import service as samples


def suspend(database: Database, tenant_id: str) -> None:
    """Refuse its requests and cancel what it has under way; its data stays.

    Several transactions: a worker locks its job and then the tenant, so no lock of the tenant may be held at a job.
    Nothing is added once the first has committed: whoever adds something asks `admission`.
    """
    with database.write() as session:
        session.execute(update(Tenant).where(Tenant.id == tenant_id).values(status="suspended"))
    with database.read() as session:
        own_jobs, own_samples, own_evaluations = _unfinished(session, session.get_one(Tenant, tenant_id))
    for job in own_jobs:
        with _unless_ended(), database.write() as session:
            jobs.cancel_job(session, tenant_id, job.id)
    for sample in own_samples:
        with _unless_ended(), database.write() as session:
            samples.cancel(session, session.get_one(Sample, sample.id))
    for evaluation in own_evaluations:
        with _unless_ended(), database.write() as session:
            evaluations.cancel_evaluation(session, tenant_id, evaluation.id)


def remove(session: Session, tenant: Tenant) -> None:
    """Take its keys and let go of its bytes, which upkeep removes; rows without bytes stay, for the books.

    Raises Conflict while a worker still holds work of its own: that may store something yet.
    """
    if tenant.status != "suspended" or any(_unfinished(session, tenant)):
        raise Conflict(f"work of {tenant.name} is still being stopped: ask again in a moment", code="tenant_busy")
    moment = now(session)
    session.execute(
        update(ApiKey).where(ApiKey.tenant_id == tenant.id, ApiKey.revoked_at.is_(None)).values(revoked_at=moment)
    )
    for table in (Dataset, Adapter):
        own = (table.tenant_id == tenant.id, table.deleted_at.is_(None))
        session.execute(update(table).where(*own).values(deleted_at=moment))
    for table in (Checkpoint, Preview, IdempotencyKey):
        session.execute(delete(table).where(table.tenant_id == tenant.id))
    session.execute(update(Sample).where(Sample.tenant_id == tenant.id).values(images=None, partials=[]))
    session.execute(update(Evaluation).where(Evaluation.tenant_id == tenant.id).values(partial_key=None))


def _unless_ended() -> suppress:
    """It came to its end by itself since we looked: that is as good."""
    return suppress(Conflict)


def _unfinished(session: Session, tenant: Tenant) -> tuple[list[Job], list[Sample], list[Evaluation]]:
    own_jobs = select(Job).where(Job.tenant_id == tenant.id, Job.status.in_(UNFINISHED))
    own_samples = select(Sample).where(Sample.tenant_id == tenant.id, Sample.status.in_(samples.UNFINISHED))
    own_evaluations = select(Evaluation).where(
        Evaluation.tenant_id == tenant.id, Evaluation.status.in_(evaluations.UNFINISHED)
    )
    return (
        list(session.scalars(own_jobs)),
        list(session.scalars(own_samples)),
        list(session.scalars(own_evaluations)),
    )
