"""Jobs that a worker holds, and what became of them."""

from typing import Any

from sqlalchemy import select

from core.bases import Catalog
from core.db.session import Database
from core.jobs import claims, upkeep
from core.models import Job, JobEvent
from tests.rows import (
    claim_job,
    expire,
    make_job,
    make_tenant,
)


def job_of(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return session.get_one(Job, job_id)


def messages_of(database: Database, job_id: str) -> list[str]:
    with database.read() as session:
        query = select(JobEvent.message).where(JobEvent.job_id == job_id).order_by(JobEvent.id)
        return list(session.scalars(query))


def start(database: Database, catalog: Catalog, **given: Any) -> claims.Plan:
    """A tenant's job that a worker holds."""
    with database.write() as session:
        make_job(session, make_tenant(session), catalog, **given)
        return claim_job(session, catalog)


def taken_over(database: Database, catalog: Catalog, plan: claims.Plan) -> claims.Plan:
    """The worker falls silent, upkeep takes the job back, another worker claims it."""
    with database.write() as session:
        expire(session, Job, plan.job_id)
    with database.write() as session:
        assert upkeep.sweep(session, max_crashes=10)
        return claim_job(session, catalog, "another")
