"""One engine a process; nothing is held across a wait.

SQLite: reads are deferred, writes take the write lock at once. PostgreSQL: reads are statements of their own, which is
what READ COMMITTED sees anyway, without a round trip each for BEGIN and COMMIT.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.sql.dml import Update

from core.clock import utc_now

DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeout)
"""What SQLAlchemy raises for a database that does not answer, is locked for too long, or has no connection left."""

_UNDEFINED = frozenset({"42P01", "42703"})  # a table, a column
_BEGIN = "sqlite_begin"
_IDLE_SINCE = "idle_since"
_PING_AFTER_SECONDS = 1.0


class Database:
    """The truth. `write()` is one transaction; `read()` may see more of what others commit with every statement."""

    def __init__(self, url: str, *, wait_seconds: float = 5.0) -> None:
        """`wait_seconds`: for a lock, or a connection of the pool. A migration waits for 4 s, and workers outlast it.
        SQLite's writers queue for its one lock instead, for up to 30 s."""
        self.engine = _engine(url, wait_seconds)
        self._writes = sessionmaker(self.engine, expire_on_commit=False)
        as_reader = {_BEGIN: "DEFERRED"} if self.engine.name == "sqlite" else {"isolation_level": "AUTOCOMMIT"}
        self._reads = sessionmaker(self.engine.execution_options(**as_reader), expire_on_commit=False)

    @contextmanager
    def write(self) -> Iterator[Session]:
        with self._writes.begin() as session:
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self._reads.begin() as session:
            yield session

    def ping(self) -> None:
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        self.engine.dispose()


def now(session: Session) -> datetime:
    """The database's clock, so that workers with wrong clocks agree on leases. SQLite has one host, hence one clock."""
    if session.get_bind().dialect.name == "postgresql":
        return session.execute(text("SELECT clock_timestamp()")).scalar_one()
    return utc_now()


def clock(session: Session) -> Any:
    """`now`, for use within a statement: PostgreSQL then reads it there, without a round trip of its own."""
    return func.clock_timestamp() if session.get_bind().dialect.name == "postgresql" else utc_now()


def is_not_migrated(error: DBAPIError) -> bool:
    """Whether PostgreSQL knows a table or a column of ours not yet. SQLite's error for it is of DATABASE_AWAY."""
    return getattr(error.orig, "sqlstate", None) in _UNDEFINED


def _engine(url: str, wait_seconds: float) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    limits = {
        "statement_timeout": 30_000,
        "lock_timeout": int(wait_seconds * 1000),
        "idle_in_transaction_session_timeout": 60_000,
    }
    options = " ".join(f"-c {name}={milliseconds}" for name, milliseconds in limits.items())
    engine = create_engine(
        parsed,
        pool_size=10,
        max_overflow=10,
        pool_timeout=wait_seconds,
        pool_use_lifo=True,  # the one that was just used is warm, its statements prepared
        connect_args={"connect_timeout": 5, "options": options},
    )
    _ping_the_idle(engine)
    return engine


def _ping_the_idle(engine: Engine) -> None:
    """As `pool_pre_ping` does, but only after a pause: a busy connection shows by itself whether it lives."""

    @event.listens_for(engine, "checkin")
    def _(_connection: Any, record: Any) -> None:
        record.info[_IDLE_SINCE] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _(connection: Any, record: Any, _proxy: object) -> None:
        if time.monotonic() - record.info.get(_IDLE_SINCE, time.monotonic()) < _PING_AFTER_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error  # the pool then drops all that are older, and tries again


def _sqlite(url: str) -> Engine:
    path = make_url(url).database
    if path and path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False}, pool_size=10, max_overflow=20)

    @event.listens_for(engine, "connect")
    def _(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver's own BEGIN is deferred; ours is chosen below
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=30000", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        mode = connection.get_execution_options().get(_BEGIN, "IMMEDIATE")
        connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


def wrote(session: Session, statement: Update) -> bool:
    """Execute a write of one row; False when the row does not meet its conditions any more."""
    return session.execute(statement).rowcount == 1  # pyright: ignore[reportAttributeAccessIssue]
