"""Nudges: promised in the transaction of the row that they are about, sent after it. At least once."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from core import faults
from core.db.session import Database, now
from core.models import OutboxMessage

Send = Callable[[str, dict[str, Any]], None]

NUDGES = "nudges"  # in session.info: this transaction promised a message, so wake the relay once it has committed
_CLAIM = timedelta(seconds=30)  # a relay that died between claim and mark: another sends again after this


def put(session: Session, topic: str, **payload: str) -> None:
    """`dataset.validate`, `job.train`, `sample.draw` or `evaluation.measure`; the payload holds ids alone."""
    session.add(OutboxMessage(topic=topic, payload=payload))
    session.info[NUDGES] = True


def relay(database: Database, send: Send, limit: int = 100) -> int:
    """Claim, commit, send, mark: no lock is held while the broker is asked. Returns how many were sent."""
    claimed = _claim(database, limit)
    sent: list[int] = []
    try:
        for message in claimed:
            send(message.topic, message.payload)
            sent.append(message.id)
            faults.point("after_publish_before_mark")
    finally:
        if claimed:
            _mark(database, sent, [message.id for message in claimed if message.id not in sent])
    return len(sent)


def forget_sent(session: Session, keep: timedelta = timedelta(hours=1)) -> None:
    session.execute(delete(OutboxMessage).where(OutboxMessage.sent_at < now(session) - keep))


def _claim(database: Database, limit: int) -> list[OutboxMessage]:
    with database.read() as session:  # most looks find nothing: they must not take SQLite's write lock
        if session.scalar(select(OutboxMessage.id).where(OutboxMessage.sent_at.is_(None)).limit(1)) is None:
            return []
    with database.write() as session:
        moment = now(session)
        free = (OutboxMessage.claimed_at.is_(None)) | (OutboxMessage.claimed_at < moment - _CLAIM)
        waiting = select(OutboxMessage).where(OutboxMessage.sent_at.is_(None), free)
        waiting = waiting.order_by(OutboxMessage.id).limit(limit).with_for_update(skip_locked=True)
        messages = list(session.scalars(waiting))
        for message in messages:
            message.claimed_at = moment
        return messages


def _mark(database: Database, sent: list[int], unsent: list[int]) -> None:
    with database.write() as session:
        session.execute(update(OutboxMessage).where(OutboxMessage.id.in_(sent)).values(sent_at=now(session)))
        session.execute(update(OutboxMessage).where(OutboxMessage.id.in_(unsent)).values(claimed_at=None))
