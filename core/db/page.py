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


def newest_first(session: Session, query: Select[Row], table: type[Row], last: Row | None, limit: int) -> Page[Row]:
    """Of the rows of `table` that `query` selects; `last` is the last one that the caller has."""
    columns: Any = table
    if last is not None:
        query = query.where(tuple_(columns.created_at, columns.id) < tuple_(*_key(last)))
    rows = list(session.scalars(query.order_by(columns.created_at.desc(), columns.id.desc()).limit(limit + 1)))
    return Page(rows[:limit], len(rows) > limit)


def _key(row: Any) -> tuple[Any, Any]:
    return row.created_at, row.id
