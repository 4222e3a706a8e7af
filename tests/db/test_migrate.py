import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from core.db import migrate
from core.db.base import Base
from core.db.session import Database
from tests.servers import Postgres


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.stack)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without a table."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_database()


def test_an_empty_database_comes_to_the_newest_schema(empty_url: str) -> None:
    assert migrate.current(empty_url) is None
    assert migrate.upgrade(empty_url) == migrate.head() == migrate.current(empty_url)
    database = Database(empty_url)
    tables = set(inspect(database.engine).get_table_names())
    database.close()
    assert tables == {*Base.metadata.tables, "alembic_version"}


def test_models_and_migrations_agree(database_url: str) -> None:
    assert migrate.drift(database_url) == []


def test_a_difference_between_models_and_tables_is_seen(database_url: str) -> None:
    """Control of the test above: a column that is missing, and one too many."""
    database = Database(database_url)
    with database.write() as session:
        session.execute(text("ALTER TABLE jobs DROP COLUMN phase"))
        session.execute(text("ALTER TABLE tenants ADD COLUMN nickname VARCHAR"))
    database.close()
    assert sorted(change[0] for change in migrate.drift(database_url)) == ["add_column", "remove_column"]


def test_a_second_upgrade_changes_nothing(database_url: str) -> None:
    database = Database(database_url)
    with database.write() as session:
        session.execute(text("INSERT INTO tenants VALUES ('tenant-1', 'kept', 'active', '2026-01-01 00:00:00', 0)"))
    migrate.upgrade(database_url)
    with database.read() as session:
        assert session.execute(text("SELECT name FROM tenants")).scalar_one() == "kept"
    database.close()


def test_the_schema_of_a_newer_release_is_left_as_it_is(database_url: str) -> None:
    """Or nothing of the old release could start after a rollback."""
    database = Database(database_url)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    assert migrate.upgrade(database_url) == migrate.current(database_url) == "9999"


def test_processes_that_start_at_once_do_not_disturb_each_other(empty_url: str, tmp_path: Path) -> None:
    """From a folder without alembic.ini, as `python -m core.db.migrate` runs in a container."""
    environment = {"DIFFFIT_DATABASE_URL": empty_url, "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}

    def start(_: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "core.db.migrate"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(start, range(4)))
    assert [done.returncode for done in ended] == [0] * 4, [done.stderr for done in ended]
    assert {done.stdout for done in ended} == {f"the database is at version {migrate.head()}\n"}
    assert migrate.drift(empty_url) == []


def test_a_migration_that_leaves_rows_without_their_parent_is_rolled_back(sqlite_url: str) -> None:
    with pytest.raises(RuntimeError, match="point nowhere"), migrate.exclusive(sqlite_url) as connection:
        connection.execute(text("INSERT INTO api_keys VALUES ('key-1', 'tenant-9', 'n', 'p', 'd', '2026-01-01', NULL)"))
    with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as plain:
        assert plain.execute("SELECT count(*) FROM api_keys").fetchone() == (0,)
    plain.close()


@pytest.mark.stack
def test_a_migration_gives_up_soon_when_a_table_is_in_use(postgres_url: str) -> None:
    """The template's timeouts, in the transaction that they are for and not after it."""
    with migrate.exclusive(postgres_url) as connection:
        from migrations.timeouts import set_timeouts

        set_timeouts(connection, lock_seconds=4, statement_seconds=60)
        assert connection.execute(text("SHOW lock_timeout")).scalar_one() == "4s"
        assert connection.execute(text("SHOW statement_timeout")).scalar_one() == "1min"
