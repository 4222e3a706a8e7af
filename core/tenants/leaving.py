"""A tenant that is locked out, or leaves: its work stops, and its bytes go."""

from collections.abc import Callable
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

Work = Job | Sample | Evaluation


def suspend(database: Database, tenant_id: str) -> None:
    """Refuse its requests and cancel what it has under way; its data stays.

    Several transactions: a worker locks its job and then the tenant, so no lock of the tenant may be held at a job.
    Nothing is added once the first has committed: whoever adds something asks `admission`.
    """
    with database.write() as session:
        session.execute(update(Tenant).where(Tenant.id == tenant_id).values(status="suspended"))
    for table, cancel in _CANCEL.items():
        with database.read() as session:
            unfinished = _unfinished(session, tenant_id, table)
        for row_id in unfinished:
            with suppress(Conflict), database.write() as session:  # ended by itself since we looked: as good
                cancel(session, tenant_id, row_id)


def remove(session: Session, tenant: Tenant) -> None:
    """Take its keys and let go of its bytes, which upkeep removes; rows without bytes stay, for the books.

    Raises Conflict while a worker still holds work of its own: that may store something yet.
    """
    if tenant.status != "suspended" or any(_unfinished(session, tenant.id, table) for table in _CANCEL):
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


def _unfinished(session: Session, tenant_id: str, table: type[Work]) -> list[str]:
    unfinished = {Job: UNFINISHED, Sample: samples.UNFINISHED, Evaluation: evaluations.UNFINISHED}[table]
    return list(session.scalars(select(table.id).where(table.tenant_id == tenant_id, table.status.in_(unfinished))))


def _cancel_sample(session: Session, _: str, sample_id: str) -> None:
    samples.cancel(session, session.get_one(Sample, sample_id))


_CANCEL: dict[type[Work], Callable[[Session, str, str], object]] = {
    Job: jobs.cancel_job,  # first: one that ends by itself may still ask for an evaluation
    Evaluation: evaluations.cancel_evaluation,
    Sample: _cancel_sample,
}
