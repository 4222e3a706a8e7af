"""What upkeep does for jobs: take back the silent ones, and know which checkpoints may go."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.db.leases import list_lost
from core.jobs.attempts import take_back
from core.jobs.states import UNFINISHED, Status
from core.models import Checkpoint, Job


def sweep(session: Session, max_crashes: int) -> bool:
    """Take back jobs whose lease ran out. True when any job waits for a worker."""
    for job in list_lost(session, Job, Status.running):
        take_back(session, job, "its worker fell silent", max_crashes)
    return session.scalar(select(Job.id).where(Job.status == Status.queued).limit(1)) is not None


def old_checkpoints(session: Session, keep: int) -> list[Checkpoint]:
    """Checkpoints beyond the newest `keep` of each job, the one that a resume needs never among them."""
    rank = func.row_number().over(partition_by=Checkpoint.job_id, order_by=Checkpoint.step.desc()).label("rank")
    ranked = select(Checkpoint.id, rank).subquery()
    used = select(Job.checkpoint_id).where(Job.checkpoint_id.is_not(None), Job.status.in_(UNFINISHED))
    beyond = select(ranked.c.id).where(ranked.c.rank > keep)
    found = session.scalars(select(Checkpoint).where(Checkpoint.id.in_(beyond), Checkpoint.id.not_in(used)))
    started_from = start_keys(session)
    return [checkpoint for checkpoint in found if checkpoint.object_key not in started_from]


def start_keys(session: Session) -> set[str]:
    """Objects that unfinished jobs continue from."""
    starts = session.scalars(select(Job.start).where(Job.start.is_not(None), Job.status.in_(UNFINISHED)))
    return {start["key"] for start in starts if start}
