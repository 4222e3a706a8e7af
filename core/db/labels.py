"""Which rows have such labels: one question, asked of SQLite and of PostgreSQL in their own words."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select, type_coerce
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session


def having(session: Session, column: Any, labels: Mapping[str, str]) -> Sequence[ColumnElement[bool]]:
    """Conditions: every one of `labels` with its value; of an empty one, that there are none at all.

    SQLite's paths cannot spell every name, so its labels are looked through; PostgreSQL has an operator.
    """
    if not labels:
        return [column == {}]
    if session.get_bind().dialect.name == "postgresql":
        return [type_coerce(column, JSONB).contains(dict(labels))]
    return [_one_is(column, name, value) for name, value in labels.items()]


def _one_is(column: Any, name: str, value: str) -> ColumnElement[bool]:
    label = func.json_each(column).table_valued("key", "value")
    return select(1).select_from(label).where(label.c.key == name, label.c.value == value).exists()
