"""Rows that a worker holds for a time (`core.models.lease`)."""

from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db.session import clock

Row = TypeVar("Row")


def list_lost(session: Session, table: type[Row], held_as: str) -> list[Row]:
    """Those whose lease ran out, locked as they are now; what another sweep has in hand is left to it.

    `held_as` is the status of a row that a worker holds.
    """
    columns: Any = table
    lost = select(table).where(columns.status == held_as, columns.lease_until < clock(session))
    lost = lost.with_for_update(skip_locked=True).execution_options(populate_existing=True)
    return list(session.scalars(lost))
