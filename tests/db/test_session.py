import threading
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, OperationalError, StatementError

from core.bases import Catalog
from core.db.page import newest_first
from core.db.session import Database, now
from core.models import ApiKey, Job, Sample, Tenant
from tests.rows import make_job, make_sample, make_tenant


def test_a_moment_comes_back_as_it_was_and_in_utc(database: Database) -> None:
    noon_in_tokyo = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=9)))
    with database.write() as session:
        tenant = make_tenant(session)
        tenant.created_at = noon_in_tokyo
    with database.read() as session:
        found = session.get_one(Tenant, tenant.id).created_at
    assert (found, found.utcoffset()) == (noon_in_tokyo, timedelta(0))
    with database.read() as session:
        same = select(Tenant.id).where(Tenant.created_at == noon_in_tokyo)
        assert session.scalars(same).all() == [tenant.id]
        assert session.scalars(select(Tenant).where(Tenant.created_at < noon_in_tokyo)).all() == []


def test_a_naive_moment_never_reaches_the_database(database: Database) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
    with pytest.raises(StatementError, match="naive"), database.write() as session:
        session.get_one(Tenant, tenant.id).created_at = datetime(2026, 1, 1)  # noqa: DTZ001  # what must be refused


def test_none_in_a_json_column_is_null_to_the_database_too(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        job = make_job(session, tenant, catalog)
        sample = make_sample(session, tenant, catalog)
        sample.images = [{"key": "k"}]
    with database.write() as session:
        session.get_one(Sample, sample.id).images = None
        session.get_one(Job, job.id).progress = None
    with database.read() as session:
        assert session.scalars(select(Sample.id).where(Sample.images.is_(None))).all() == [sample.id]
        assert session.scalars(select(Job.id).where(Job.progress.is_(None))).all() == [job.id]


def test_a_transaction_that_raises_leaves_nothing(database: Database) -> None:
    def write_and_raise() -> None:
        with database.write() as session:
            make_tenant(session)
            raise KeyError("after the insert")

    with pytest.raises(KeyError):
        write_and_raise()
    with database.read() as session:
        assert session.scalars(select(Tenant)).all() == []


def test_a_commit_that_fails_is_an_error_and_leaves_nothing(database: Database) -> None:
    with database.write() as session:
        make_tenant(session, "taken")
    with pytest.raises(IntegrityError), database.write() as session:
        session.add_all([Tenant(name="free"), Tenant(name="taken")])  # flushed by the commit itself
    with database.read() as session:
        assert session.scalars(select(Tenant.name)).all() == ["taken"]


def test_foreign_keys_are_enforced(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(ApiKey(tenant_id="tenant-of-nobody", name="n", prefix="p", digest="d"))


def test_a_read_does_not_wait_for_a_writer(database: Database) -> None:
    with database.write() as writing:
        make_tenant(writing, "not-yet-there")
        answers: list[object] = []

        def read() -> None:
            with database.read() as session:
                answers.append(session.scalars(select(Tenant)).all())

        reader = threading.Thread(target=read)
        reader.start()
        reader.join(timeout=10)
        assert answers == [[]], "the reader waited for the writer's commit"


def test_a_writer_waits_for_the_one_before_and_sees_what_it_wrote(database: Database) -> None:
    """Forty read-then-write transactions over eight threads lose no update and meet no error."""
    with database.write() as session:
        tenant = make_tenant(session)

    def add() -> None:
        for _ in range(5):
            with database.write() as session:
                row = session.get_one(Tenant, tenant.id, with_for_update=True)
                row.device_seconds += 1

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.get_one(Tenant, tenant.id).device_seconds == 40


def test_pages_are_newest_first_and_break_ties_by_id(database: Database) -> None:
    """Seven rows of one moment and one younger: every row once, in one order, whatever the page's size."""
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    with database.write() as session:
        for number in range(7):
            session.add(Tenant(id=f"tenant-{number}", name=str(number), created_at=moment))
        session.add(Tenant(id="tenant-0-young", name="young", created_at=moment + timedelta(microseconds=1)))
    expected = ["tenant-0-young", *[f"tenant-{number}" for number in range(6, -1, -1)]]
    for limit in (1, 3, 8, 20):
        with database.read() as session:
            seen: list[Tenant] = []
            has_more = True
            while has_more:
                page = newest_first(session, select(Tenant), Tenant, seen[-1] if seen else None, limit)
                assert len(page.rows) <= limit
                seen += page.rows
                has_more = page.has_more
            assert [row.id for row in seen] == expected


def test_now_moves_within_a_transaction(database: Database) -> None:
    with database.write() as session:
        first = now(session)
        time.sleep(0.01)
        assert now(session) - first >= timedelta(milliseconds=9)


@pytest.mark.stack
def test_leases_are_measured_by_the_databases_clock(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.db.session.utc_now", lambda: datetime(1999, 1, 1, tzinfo=UTC))
    database = Database(postgres_url)
    with database.read() as session:
        assert now(session).year >= 2026
    database.close()


@pytest.mark.stack
@pytest.mark.parametrize(("wait", "lock_timeout"), [({}, "5s"), ({"wait_seconds": 1.5}, "1500ms")])
def test_a_lock_that_somebody_holds_is_given_up_in_time(
    postgres_url: str, wait: dict[str, float], lock_timeout: str
) -> None:
    database = Database(postgres_url, **wait)
    with database.read() as session:
        limits = [
            session.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
        ]
    assert limits == [lock_timeout, "30s", "1min"]

    def look() -> None:
        with database.write() as session:
            session.execute(text("SET LOCAL lock_timeout = '50ms'"))
            session.scalars(select(Tenant)).all()

    with database.write() as holder:
        holder.execute(text("LOCK TABLE tenants"))
        with pytest.raises(OperationalError, match="lock timeout"):
            look()
    database.close()


def test_sqlite_is_set_up_for_many_processes(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.read() as session:
        found = {
            name: session.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
        }
    database.close()
    assert found == {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 30000, "foreign_keys": 1}
