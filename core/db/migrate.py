"""Bring a database to the newest schema, from code: `python -m core.db.migrate`, or `upgrade(url)`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text

from core.db.base import Base
from core.db.session import Database
from core.settings import get_settings

_LOCK = 0x64696666  # any fixed number: whoever migrates this database asks for the same one
_WAIT_SECONDS = 600


def upgrade(url: str) -> str:
    """Run what is missing, in one transaction; return the version. A second process waits, then has nothing to do.

    Nor has this one where a newer release was here before: old code runs on its schema.
    """
    with exclusive(url) as connection:
        if is_behind(_version(connection)):
            command.upgrade(_config(connection), "head")
        return _version(connection) or ""


def is_behind(version: str | None) -> bool:
    """Whether migrations of ours are missing. A version that our scripts do not know is a newer release's."""
    return version is None or (version in _known() and version != head())


def current(url: str) -> str | None:
    """The version that the database is at; None before the first migration."""
    database = Database(url)
    try:
        with database.read() as session:
            return _version(session.connection())
    finally:
        database.close()


@cache
def head() -> str:
    """The version that this code was written for."""
    return _scripts().get_current_head() or ""


@cache
def _known() -> frozenset[str]:
    return frozenset(script.revision for script in _scripts().walk_revisions())


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def drift(url: str) -> list[Any]:
    """What the tables in the database and the models in the code disagree about; empty when they agree."""
    database = Database(url)
    try:
        with database.read() as session:
            options = {"compare_server_default": True}
            return compare_metadata(MigrationContext.configure(session.connection(), opts=options), Base.metadata)
    finally:
        database.close()


@contextmanager
def exclusive(url: str) -> Iterator[Connection]:
    """The one connection that may change this database's schema, in a transaction that commits at the end."""
    database = Database(url)
    try:
        if database.engine.dialect.name == "sqlite":
            event.listen(database.engine, "connect", _without_foreign_keys)
        with database.engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SET LOCAL lock_timeout = '{_WAIT_SECONDS}s'"))
                connection.execute(text(f"SET LOCAL statement_timeout = '{_WAIT_SECONDS}s'"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            yield connection
            if connection.dialect.name == "sqlite":
                _check_foreign_keys(connection)
    finally:
        database.close()


def _without_foreign_keys(connection: Any, _record: object) -> None:
    """SQLite alters a table by copying it, which would break rows that point at the old one for a moment."""
    connection.execute("PRAGMA foreign_keys=OFF")


def _check_foreign_keys(connection: Connection) -> None:
    if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
        raise RuntimeError(f"the migration left rows that point nowhere: {broken[:3]}")


def _version(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def main() -> None:
    version = upgrade(get_settings().database)
    sys.stdout.write(f"the database is at version {version}\n")


if __name__ == "__main__":
    main()
