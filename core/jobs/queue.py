"""Where a job stands among all that wait: the order in which `core.jobs.service.claim` takes them."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.jobs.states import Status
from core.models import Job, Tenant


def positions(session: Session, job_ids: list[str]) -> dict[str, int]:
    """1 is next. Only queued jobs have a position."""
    order = (Tenant.device_seconds, Job.created_at, Job.id)
    place = func.row_number().over(order_by=order).label("place")
    ranked = (
        select(Job.id, place).join(Tenant, Tenant.id == Job.tenant_id).where(Job.status == Status.queued).subquery()
    )
    found = session.execute(select(ranked.c.id, ranked.c.place).where(ranked.c.id.in_(job_ids)))
    return {row[0]: row[1] for row in found}
