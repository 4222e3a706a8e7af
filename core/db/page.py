"""Keyset pages over a tenant's rows, newest first, as OpenAI's lists have them (`after`, `limit`)."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import Session

Row = TypeVar("Row")


@dataclass(frozen=True)
class Page(Generic[Row]):
    rows: list[Row]
    has_more: bool


def newest_first(
    session: Session, query: Select[Any], created_at: Any, id_: Any, after: tuple[Any, Any] | None, limit: int
) -> Page[Any]:
    """`after` is the (created_at, id) of the last row that the caller has."""
    if after is not None:
        query = query.where(tuple_(created_at, id_) < tuple_(*after))
    rows = list(session.scalars(query.order_by(created_at.desc(), id_.desc()).limit(limit + 1)))
    return Page(rows[:limit], len(rows) > limit)
