"""The states of a job and the one function that moves between them."""

from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, update
from sqlalchemy.orm import Session

from core.db.session import now, wrote
from core.models import Job


class Status(StrEnum):
    validating_files = "validating_files"
    queued = "queued"
    running = "running"
    paused = "paused"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


TERMINAL = frozenset({Status.succeeded, Status.failed, Status.cancelled})
UNFINISHED = frozenset(Status) - TERMINAL

LEGAL: dict[Status, frozenset[Status]] = {
    Status.validating_files: frozenset({Status.queued, Status.paused, Status.failed, Status.cancelled}),
    Status.queued: frozenset({Status.running, Status.paused, Status.failed, Status.cancelled}),
    Status.running: frozenset({Status.queued, Status.paused, *TERMINAL}),
    Status.paused: frozenset({Status.queued, Status.validating_files, Status.failed, Status.cancelled}),
}


def move(
    session: Session, job_id: str, source: Status, target: Status, *only_if: ColumnElement[bool], **values: Any
) -> bool:
    """Compare and set. False when the job is not in `source` any more, or `only_if` no longer holds."""
    if target not in LEGAL.get(source, frozenset()):
        raise ValueError(f"no job goes from {source} to {target}")
    moment = now(session)
    if target in TERMINAL:
        values |= {"finished_at": moment}
    if target in TERMINAL or target == Status.paused:
        values |= {"phase": None}
    if source == Status.running:
        values |= {"lease_until": None}
    statement = update(Job).where(Job.id == job_id, Job.status == source, *only_if)
    return wrote(session, statement.values(status=target, updated_at=moment, **values))
