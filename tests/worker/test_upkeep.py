"""Upkeep: lost work is taken back whatever else goes wrong."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from core.bases import Catalog
from core.datasets import service as datasets
from core.db import migrate
from core.db.session import Database
from core.models import Dataset, Job
from core.samples import service as samples
from core.settings import Settings
from core.storage.base import ObjectInfo
from core.storage.local import LocalStore
from tests.conftest import make_settings
from tests.rows import LEASE, claim_job, expire, make_dataset, make_job, make_tenant
from worker.upkeep import Upkeep


class SilentStore(LocalStore):
    """Does not answer until it is told to, as a store behind a broken network."""

    asked: threading.Event
    answers: threading.Event

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.asked.set()
        assert self.answers.wait(60)
        return super().list(prefix)


@pytest.fixture
def upkeep_settings(settings: Settings) -> Settings:
    quick = make_settings(settings.data_dir, sweep_seconds=0.05)
    quick.data_dir.mkdir()
    migrate.upgrade(quick.database)
    return quick


@pytest.fixture
def lost_job(database: Database, catalog: Catalog) -> str:
    """Its worker's lease has run out."""
    with database.write() as session:
        job_id = make_job(session, make_tenant(session), catalog).id
        claim_job(session, catalog)
        expire(session, Job, job_id)
    return job_id


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_store_that_does_not_answer_holds_up_no_lost_work(
    upkeep_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.upkeep._RELAY_SECONDS", 0.05)
    database = Database(upkeep_settings.database)
    store = SilentStore(upkeep_settings.data_dir / "objects")
    store.asked, store.answers = threading.Event(), threading.Event()
    monkeypatch.setattr("worker.upkeep.open_store", lambda _: store)
    upkeep = Upkeep(upkeep_settings)
    stopping, roused = threading.Event(), threading.Event()
    running = threading.Thread(target=upkeep.run, args=(stopping, roused))
    running.start()
    try:
        assert store.asked.wait(60)
        with database.write() as session:
            dataset = make_dataset(session, make_tenant(session), "uploaded")
            plan = datasets.claim(session, "v", LEASE)
            assert plan is not None
            expire(session, Dataset, dataset.id)

        def is_taken_back() -> bool:
            with database.read() as session:
                return session.get_one(Dataset, dataset.id).crashes == 1

        until(is_taken_back)
    finally:
        store.answers.set()
        stopping.set()
        roused.set()
        running.join(60)
        database.close()
    assert not running.is_alive()
    assert "retention" not in [thread.name for thread in threading.enumerate()]


def test_a_sweep_that_fails_takes_none_of_the_others_with_it(
    database: Database, lost_job: str, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise ValueError("a row that nobody can read")

    monkeypatch.setattr(samples, "sweep", fail)
    upkeep = Upkeep(make_settings(tmp_path, database_url=database_url))
    upkeep.sweep()
    upkeep.relay()  # no broker is there: that costs a try
    upkeep.close()
    with database.read() as session:
        assert session.get_one(Job, lost_job).status == "queued"


def test_who_could_not_extend_its_lease_in_an_outage_is_not_taken_for_dead(
    database: Database, lost_job: str, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upkeep = Upkeep(make_settings(tmp_path, database_url=database_url, lease_seconds=1.0))

    def crashes() -> int:
        with database.read() as session:
            return session.get_one(Job, lost_job).crashes

    def away(_: Database) -> None:
        raise OperationalError("SELECT 1", {}, Exception("no connection"))

    with monkeypatch.context() as outage:
        outage.setattr(Database, "ping", away)
        with pytest.raises(OperationalError):
            upkeep.sweep()
    upkeep.sweep()
    assert crashes() == 0
    time.sleep(1.0)
    upkeep.sweep()
    assert crashes() == 1
    upkeep.close()
