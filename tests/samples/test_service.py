from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from core.bases import Catalog
from core.db.session import Database
from core.errors import NotFound, OverQuota
from core.models import OutboxMessage, Sample, Tenant
from core.samples import service as samples
from core.samples.repository import SampleRepository
from core.samples.service import SamplePlan
from tests.races import race
from tests.rows import LEASE, expire, make_sample, make_tenant


def claim(
    database: Database, catalog: Catalog, limit: int = 10, worker: str = "w", suspects: bool = False
) -> list[SamplePlan]:
    with database.write() as session:
        return samples.claim(session, worker, LEASE, catalog, limit, suspects)


def one_claimed(database: Database, catalog: Catalog) -> SamplePlan:
    with database.write() as session:
        make_sample(session, make_tenant(session), catalog)
    (plan,) = claim(database, catalog)
    return plan


def found(database: Database, plan: SamplePlan) -> Sample:
    with database.read() as session:
        return session.get_one(Sample, plan.sample_id)


def test_every_tenants_oldest_goes_before_any_tenants_second(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        busy, calm = make_tenant(session), make_tenant(session)
        asked = {"busy": [make_sample(session, busy, catalog).id for _ in range(5)]}
        asked["calm"] = [make_sample(session, calm, catalog).id for _ in range(2)]
    plans = claim(database, catalog, limit=5)
    mine = asked["busy"], asked["calm"]
    assert [plan.sample_id for plan in plans] == [mine[0][0], mine[1][0], mine[0][1], mine[1][1], mine[0][2]]
    assert [plan.sample_id for plan in claim(database, catalog, limit=5)] == mine[0][3:]
    with database.read() as session:
        assert samples.is_waiting(session, catalog) is False


def test_a_request_for_a_base_that_this_worker_lacks_is_left(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        make_sample(session, make_tenant(session), catalog).base = "another-base"
    assert claim(database, catalog) == []
    with database.read() as session:
        assert samples.is_waiting(session, catalog) is False


def test_a_drawn_request_has_its_images_and_is_finished_once(database: Database, catalog: Catalog) -> None:
    plan = one_claimed(database, catalog)
    images = [{"key": "k", "sha256": "0" * 64, "bytes": 3, "seed": 0}]
    with database.write() as session:
        assert samples.finish(session, plan, images, {"batch_size": 4})
        assert samples.finish(session, plan, [], {}) is False
        assert samples.fail(session, plan, code="late", message="late") is False
    row = found(database, plan)
    assert (row.status, row.images, row.stats, row.lease_until) == ("succeeded", images, {"batch_size": 4}, None)
    assert row.finished_at is not None


LATE: dict[str, Any] = {
    "extend": lambda session, plan: samples.extend(session, [plan], 999),
    "finish": lambda session, plan: samples.finish(session, plan, [], {}),
    "fail": lambda session, plan: samples.fail(session, plan, code="late", message="late"),
    "release": lambda session, plan: samples.release(session, plan),
}


@pytest.mark.parametrize("verb", LATE)
def test_a_late_attempt_writes_nothing(database: Database, catalog: Catalog, verb: str) -> None:
    late = one_claimed(database, catalog)
    with database.write() as session:
        expire(session, Sample, late.sample_id)
    with database.write() as session:
        assert samples.sweep(session, 10)
        nudges = len(session.scalars(select(OutboxMessage)).all())
    (newer,) = claim(database, catalog, worker="another", suspects=True)
    before = found(database, late)
    with database.write() as session:
        assert not LATE[verb](session, late)
        assert len(session.scalars(select(OutboxMessage)).all()) == nudges
    after = found(database, late)
    assert [getattr(after, c.key) for c in Sample.__table__.columns] == [
        getattr(before, c.key) for c in Sample.__table__.columns
    ]
    assert (newer.attempt, after.worker) == (2, "another")


def test_a_request_that_kills_its_workers_is_given_up(database: Database, catalog: Catalog) -> None:
    plan = one_claimed(database, catalog)
    for crash in range(1, 4):
        with database.write() as session:
            expire(session, Sample, plan.sample_id)
        with database.write() as session:
            assert samples.sweep(session, 3) is (crash < 3)
        claim(database, catalog, suspects=True)
    row = found(database, plan)
    assert (row.status, row.error and row.error["code"], row.attempt) == ("failed", "crashed", 3)


def test_what_a_worker_died_with_is_claimed_apart(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        suspects = [make_sample(session, tenant, catalog) for _ in range(2)]
        for sample in suspects:
            sample.crashes = 1
        sound = make_sample(session, tenant, catalog)
    assert [(plan.sample_id, plan.crashes) for plan in claim(database, catalog)] == [(sound.id, 0)]
    [plan] = claim(database, catalog, limit=1, suspects=True)
    assert (plan.sample_id, plan.crashes) == (suspects[0].id, 1)


def test_what_another_release_asked_for_stays_queued_and_stands_in_nobodys_way(
    database: Database, catalog: Catalog
) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        newer, lost, plain = (make_sample(session, tenant, catalog) for _ in range(3))
        newer.request = {**newer.request, "of_a_newer_release": 1}
    assert claim(database, catalog, limit=1) == []
    assert [plan.sample_id for plan in claim(database, catalog, limit=2)] == [lost.id, plain.id]
    with database.write() as session:
        assert not samples.is_waiting(session, catalog)
        row = session.get_one(Sample, lost.id)
        row.request = {**row.request, "of_a_newer_release": 1}
        for sample in (lost, plain):
            expire(session, Sample, sample.id)
    with database.write() as session:
        assert samples.sweep(session, 3)
    with database.read() as session:
        rows = [session.get_one(Sample, sample.id) for sample in (newer, lost, plain)]
    assert [(row.status, row.attempt, row.crashes) for row in rows] == [
        ("queued", 0, 0),
        ("queued", 1, 1),
        ("queued", 1, 1),
    ]
    assert (rows[0].worker, rows[0].lease_until) == (None, None)


def test_a_shutdown_is_nobodys_failure(database: Database, catalog: Catalog) -> None:
    plan = one_claimed(database, catalog)
    for _ in range(5):
        with database.write() as session:
            assert samples.release(session, plan)
            assert samples.sweep(session, 3)
        (plan,) = claim(database, catalog)
    assert (found(database, plan).crashes, plan.attempt) == (0, 6)


def test_unfinished_requests_count_toward_the_quota_whoever_asks_at_once(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)

    def ask() -> bool:
        try:
            with database.write() as session:
                make_sample(session, tenant, catalog, max_queued=3)
        except OverQuota:
            return False
        return True

    assert sum(race(*[ask] * 8)) == 3
    plan = claim(database, catalog, limit=1)[0]
    with database.write() as session:
        assert samples.finish(session, plan, [], {})
        make_sample(session, session.get_one(Tenant, tenant.id), catalog, max_queued=3)


def test_each_request_is_claimed_once_and_every_claim_takes_what_it_can(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        some = [make_tenant(session) for _ in range(3)]
        made = {make_sample(session, tenant, catalog).id for tenant in some for _ in range(8)}

    def work() -> list[str]:
        return [plan.sample_id for _ in range(8) for plan in claim(database, catalog, limit=3)]

    claimed = [sample_id for mine in race(work, work, work, work) for sample_id in mine]
    assert len(claimed) == len(made)
    assert set(claimed) == made


def test_images_that_were_kept_long_enough_are_told(database: Database, catalog: Catalog) -> None:
    plan = one_claimed(database, catalog)
    with database.write() as session:
        assert samples.finish(session, plan, [{"key": "k"}], {})
        assert samples.list_expired(session, timedelta(hours=1)) == []
        (expired,) = samples.list_expired(session, timedelta(seconds=-1))
        expired.images = None
    with database.read() as session:
        assert samples.list_expired(session, timedelta(seconds=-1)) == []


def test_another_tenants_request_is_not_there(database: Database, catalog: Catalog) -> None:
    plan = one_claimed(database, catalog)
    with database.write() as session:
        assert SampleRepository(session, plan.tenant_id).get(plan.sample_id).id == plan.sample_id
        with pytest.raises(NotFound):
            SampleRepository(session, make_tenant(session).id).get(plan.sample_id)
