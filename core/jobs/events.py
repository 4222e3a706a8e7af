"""What a job says of itself while it goes."""

from typing import Any

from sqlalchemy.orm import Session

from core import outbox
from core.models import JobEvent


def add_event(session: Session, job_id: str, tenant_id: str, message: str, **fields: Any) -> None:
    session.add(JobEvent(job_id=job_id, tenant_id=tenant_id, message=message, **fields))


def announce_queued(session: Session, job_id: str, tenant_id: str) -> None:
    add_event(session, job_id, tenant_id, "Files validated, moving job to queued state")
    outbox.put(session, "job.train", job_id=job_id)
