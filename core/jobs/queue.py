"""Where a job stands among all that wait: the order in which `core.jobs.claims.claim` takes them.

Deficit round robin over tenants: each has a job running before any has two, and those that used the device least come
first. Jobs of one tenant come in the order in which they were made.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from core.jobs.states import Status
from core.models import Job, Tenant


def positions(session: Session, job_ids: list[str]) -> dict[str, int]:
    """1 is next. Only queued jobs have a position."""
    ranked = _turns().subquery()
    place = func.row_number().over(order_by=_order(ranked.c)).label("place")
    placed = select(ranked.c.id, place).subquery()
    found = session.execute(select(placed.c.id, placed.c.place).where(placed.c.id.in_(job_ids)))
    return {row[0]: row[1] for row in found}


def waiting_ids(session: Session, models: Sequence[str], limit: int, devices: int) -> list[str]:
    """Queued jobs of these bases that ask for no more than so many devices, the next one first."""
    ranked = _turns().where(Job.model.in_(models), Job.devices <= devices).subquery()
    return list(session.scalars(select(ranked.c.id).order_by(*_order(ranked.c)).limit(limit)))


def _turns() -> Select[str, datetime, float, Any]:
    """Each queued job with its turn: how many of its tenant's jobs go, or are running, before it."""
    running = (
        select(Job.tenant_id, func.count().label("jobs"))
        .where(Job.status == Status.running)
        .group_by(Job.tenant_id)
        .subquery()
    )
    rank = func.row_number().over(partition_by=Job.tenant_id, order_by=(Job.created_at, Job.id))
    return (
        select(
            Job.id,
            Job.created_at,
            Tenant.device_seconds,
            (rank + func.coalesce(running.c.jobs, 0)).label("turn"),
        )
        .join(Tenant, Tenant.id == Job.tenant_id)
        .outerjoin(running, running.c.tenant_id == Job.tenant_id)
        .where(Job.status == Status.queued)
    )


def _order(columns: Any) -> tuple[Any, ...]:
    return columns.turn, columns.device_seconds, columns.created_at, columns.id
