"""The database or the store away under work that goes on: nothing is counted, nothing is lost, nothing spins."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from core.db.session import Database
from core.jobs import service as jobs
from core.models import Job
from core.storage.base import StorageUnavailable
from tests.worker.shop import MODEL, Shop
from tests.worker.test_evaluating import ask, found
from worker.outages import Patience, Rest

AtStep = dict[tuple[int, int], Any]
SEED = 7  # of the shop's jobs


@dataclass
class Away:
    """How many of the next calls find nobody there."""

    calls: float = 0
    refused: int = 0

    def meet(self, error: Exception) -> None:
        if self.calls > 0:
            self.calls -= 1
            self.refused += 1
            raise error


@pytest.fixture
def database(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Away:
    """The worker's and the test's: bring it back before you look."""
    away = Away()
    shop.services.settings.lease_seconds = 600.0  # no heartbeat is among the calls
    for name in ("read", "write"):
        real = getattr(Database, name)

        @contextmanager
        def transaction(self: Database, real: Any = real) -> Iterator[Session]:
            away.meet(OperationalError("SELECT 1", {}, Exception("the connection is lost")))
            with real(self) as session:
                yield session

        monkeypatch.setattr(Database, name, transaction)
    return away


@dataclass
class Store:
    puts: Away
    gets: Away


@pytest.fixture
def store(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Store:
    """One that refuses, and is asked again soon."""
    refusing = Store(Away(), Away())
    for name, away in (("put", refusing.puts), ("get", refusing.gets)):
        real = getattr(shop.services.store, name)

        def answer(*args: Any, real: Any = real, away: Away = away) -> Any:
            away.meet(StorageUnavailable("cannot write an object: No space left on device"))
            return real(*args)

        monkeypatch.setattr(shop.services.store, name, answer)
    monkeypatch.setattr("worker.slice.Patience", partial(Patience, again_seconds=0.05))
    return refusing


@pytest.fixture
def wanted(shop: Shop) -> str:
    """The sha256 of an undisturbed job."""
    return sha(shop, pumped(shop))


def pumped(shop: Shop) -> str:
    job_id = shop.job()
    shop.pump()
    return job_id


def sha(shop: Shop, job_id: str) -> str:
    [adapter] = shop.adapters(job_id)
    return adapter.sha256


def course(job: Job) -> tuple[str, int, int]:
    return job.status, job.attempt, job.crashes


def test_a_database_that_is_away_for_a_moment_costs_nothing(
    shop: Shop, wanted: str, at_step: AtStep, database: Away
) -> None:
    for step in (5, 6, 7):
        at_step[SEED, step] = lambda: setattr(database, "calls", 2)
    job_id = pumped(shop)
    assert database.refused == 6
    assert (course(shop.get_job(job_id)), sha(shop, job_id)) == (("succeeded", 1, 0), wanted)


def test_a_job_that_waited_too_long_for_the_database_goes_back_and_is_not_counted(
    shop: Shop, wanted: str, at_step: AtStep, database: Away
) -> None:
    shop.runtime.transactions._patience = 0.1  # a first try and another
    at_step[SEED, 6] = lambda: setattr(database, "calls", 2)
    job_id = pumped(shop)
    assert course(shop.get_job(job_id)) == ("queued", 1, 0)
    shop.runtime.rest.end()
    shop.pump()
    assert (course(shop.get_job(job_id)), sha(shop, job_id)) == (("succeeded", 2, 0), wanted)


def test_a_pump_outlives_a_database_that_stays_away(shop: Shop, wanted: str, at_step: AtStep, database: Away) -> None:
    shop.runtime.transactions._patience = 0.1
    at_step[SEED, 6] = lambda: setattr(database, "calls", math.inf)
    job_id = pumped(shop)
    database.calls = 0
    assert shop.get_job(job_id).status == "running"  # nobody could say otherwise
    shop.lose_leases()
    shop.runtime.rest.end()
    shop.pump()
    assert (shop.get_job(job_id).status, sha(shop, job_id)) == ("succeeded", wanted)


def test_pictures_and_evaluations_outlast_the_database(shop: Shop, database: Away) -> None:
    sample_id, evaluation_id = shop.sample(), ask(shop)
    deliver = shop.services.store.put

    def put(*args: Any) -> None:
        database.calls = 3
        deliver(*args)

    shop.services.store.put = put  # pyright: ignore[reportAttributeAccessIssue]
    shop.pump()
    assert database.refused >= 3
    sample, evaluation = shop.get_sample(sample_id), found(shop, evaluation_id)
    assert (sample.status, sample.attempt) == ("succeeded", 1)
    assert (evaluation.status, evaluation.attempt, evaluation.crashes) == ("succeeded", 1, 0)


def test_an_image_waits_for_a_store_that_refuses(shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than a request may kill workers, and without being drawn again at once each time."""
    shop.runtime.drawing_rest = Rest(first_seconds=0.05, longest_seconds=0.2)
    store.puts.calls = 5
    sample_id = shop.sample()
    shop.pump()
    found = shop.get_sample(sample_id)
    assert (found.status, found.attempt, found.crashes) == ("succeeded", 6, 0)
    store.puts.calls = math.inf
    monkeypatch.setattr("worker.drawing._MOST_ATTEMPTS", 3)
    sample_id = shop.sample()
    shop.pump()
    error = shop.get_sample(sample_id).error or {}
    assert (error["code"], shop.get_sample(sample_id).attempt) == (StorageUnavailable.code, 3)


def test_training_goes_on_where_the_store_refuses_and_its_adapter_waits(
    shop: Shop, wanted: str, at_step: AtStep, store: Store
) -> None:
    at_step[SEED, 2] = lambda: setattr(store.puts, "calls", math.inf)
    at_step[SEED, 11] = lambda: setattr(store.puts, "calls", 3)
    job_id = pumped(shop)
    assert store.puts.refused >= 4
    assert not at_step, "no step was taken twice"
    assert (course(shop.get_job(job_id)), sha(shop, job_id)) == (("succeeded", 1, 0), wanted)


def test_a_slice_does_not_end_in_a_store_that_refuses(shop: Shop, wanted: str, at_step: AtStep, store: Store) -> None:
    shop.services.settings.slice_seconds = 0.02
    store.puts.calls = math.inf
    at_step[SEED, 9] = lambda: setattr(store.puts, "calls", 0)
    job_id = pumped(shop)
    while shop.get_job(job_id).status != "succeeded":
        shop.pump()
    assert shop.get_job(job_id).attempt <= 4, "what was trained was kept"
    assert (shop.get_job(job_id).crashes, sha(shop, job_id)) == (0, wanted)


def test_a_store_that_refuses_for_too_long_costs_what_was_not_kept_and_no_crash(
    shop: Shop, wanted: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.slice.Patience", partial(Patience, again_seconds=0.05, longest_seconds=0.0))
    store.puts.calls = math.inf
    job_id = pumped(shop)
    assert course(shop.get_job(job_id)) == ("queued", 1, 0)
    store.puts.calls = 0
    shop.runtime.rest.end()
    shop.pump()
    assert (course(shop.get_job(job_id)), sha(shop, job_id)) == (("succeeded", 2, 0), wanted)


def test_a_job_that_waits_to_be_published_can_be_cancelled(
    shop: Shop, at_step: AtStep, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = shop.job()
    put = shop.services.store.put

    def cancelled(*args: Any) -> None:
        if store.puts.refused == 1:
            with shop.services.database.write() as session:
                jobs.cancel_job(session, shop.tenant_id, job_id)
        put(*args)

    monkeypatch.setattr(shop.services.store, "put", cancelled)
    at_step[SEED, 11] = lambda: setattr(store.puts, "calls", math.inf)
    shop.pump()
    assert shop.get_job(job_id).status == "cancelled"
    assert shop.adapters(job_id) == []
    assert store.puts.refused == 2


def test_a_pause_waits_for_its_checkpoint(shop: Shop, wanted: str, at_step: AtStep, store: Store) -> None:
    job_id = shop.job()

    def pause() -> None:
        store.puts.calls = math.inf
        with shop.services.database.write() as session:
            jobs.pause_job(session, shop.tenant_id, job_id)

    at_step[SEED, 5] = pause
    at_step[SEED, 8] = lambda: setattr(store.puts, "calls", 0)
    at_step[SEED, 9] = lambda: time.sleep(0.06)  # longer than the store is left alone
    shop.pump()
    job = shop.get_job(job_id)
    assert job.status == "paused"
    assert job.step >= 9
    with shop.services.database.write() as session:
        jobs.resume_job(session, shop.tenant_id, job_id)
    shop.pump()
    assert sha(shop, job_id) == wanted


def test_a_store_that_cannot_be_read_is_left_alone_for_a_while(shop: Shop, wanted: str, store: Store) -> None:
    shop.runtime._prepared.clear()  # as in another process
    shop.runtime.rest = Rest(first_seconds=600.0)
    store.gets.calls = math.inf
    job_id, evaluation_id = shop.job(), ask(shop)
    for _ in range(3):
        shop.pump()
    assert shop.get_job(job_id).attempt + found(shop, evaluation_id).attempt == 1
    shop.runtime.rest.end()
    shop.pump()
    assert shop.get_job(job_id).attempt + found(shop, evaluation_id).attempt == 2
    assert (shop.get_job(job_id).status, found(shop, evaluation_id).status) == ("queued", "queued")
    store.gets.calls = 0
    shop.runtime.rest.end()
    shop.pump()
    assert (shop.get_job(job_id).crashes, found(shop, evaluation_id).crashes) == (0, 0)
    assert (found(shop, evaluation_id).status, sha(shop, job_id)) == ("succeeded", wanted)


def test_a_worker_rests_longer_each_time_until_work_has_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("worker.outages.time.monotonic", lambda: clock[0])
    rest, lengths = Rest(first_seconds=1.0, longest_seconds=5.0), []
    for _ in range(4):
        rest.begin()
        began = clock[0]
        while rest.is_on:
            clock[0] += 1.0
        lengths.append(clock[0] - began)
    assert lengths == [1.0, 2.0, 4.0, 5.0]
    rest.end()
    assert not rest.is_on


def test_what_meets_an_outage_while_the_worker_rests_makes_it_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("worker.outages.time.monotonic", lambda: clock[0])
    rest = Rest(first_seconds=1.0, longest_seconds=60.0)
    for _ in range(8):
        rest.begin()
    clock[0] += 1.5
    assert not rest.is_on


def test_previews_that_a_slice_leaves_behind_hold_no_memory(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.slice._PREVIEW_SECONDS", 0.0)
    shop.services.settings.slice_seconds = 0.02
    job_id = shop.job(preview_every=1, preview_steps=50)
    while shop.get_job(job_id).status != "succeeded":
        shop.pump()
    assert shop.runtime._held == {}


def test_a_slice_that_ends_waits_a_little_for_its_previews(shop: Shop, at_step: AtStep) -> None:
    job_id = shop.job(preview_every=6, preview_steps=10)

    def pause() -> None:
        with shop.services.database.write() as session:
            jobs.pause_job(session, shop.tenant_id, job_id)

    at_step[SEED, 6] = pause
    shop.pump()
    assert shop.get_job(job_id).status == "paused"
    assert "Preview drawn at step 6" in shop.messages(job_id)
    assert not shop.runtime.device(MODEL).engine.has_work
