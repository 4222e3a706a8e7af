"""What Alembic runs, for the `alembic` command and for `core.db.migrate` alike."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import Connection
from sqlalchemy.sql.type_api import TypeEngine

import core.models  # noqa: F401  # registers the tables
from core.db.base import Base, Json, UtcDateTime
from core.db.migrate import exclusive
from core.settings import get_settings


def render_item(kind: str, item: Any, autogen_context: Any) -> str | Literal[False]:
    """Versions name plain types: they must not change when our own column types do."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and _is_json(item):
        autogen_context.imports.add("from sqlalchemy.dialects.postgresql import JSONB")
        return 'sa.JSON().with_variant(JSONB(), "postgresql")'
    return False


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,  # SQLite alters a table by copying it; PostgreSQL takes the same script
        render_item=render_item,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _is_json(item: TypeEngine[Any]) -> bool:
    return type(item) is type(Json) and bool(getattr(item, "_variant_mapping", None))


if context.is_offline_mode():
    raise SystemExit("migrations need a live database: they look at what is there (no --sql mode)")

given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with exclusive(get_settings().database) as connection:
        run(connection)
