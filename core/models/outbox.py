from datetime import datetime
from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from core.clock import utc_now
from core.db.base import Base, Counter


class OutboxMessage(Base):
    """A nudge that was promised in the same transaction as the row that it is about."""

    __tablename__ = "outbox_messages"

    id: Mapped[int] = mapped_column(Counter, primary_key=True, autoincrement=True)
    topic: Mapped[str]
    payload: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    claimed_at: Mapped[datetime | None] = mapped_column(default=None)
    sent_at: Mapped[datetime | None] = mapped_column(default=None, index=True)
