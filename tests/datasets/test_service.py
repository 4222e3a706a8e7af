from typing import Any

import pytest
from sqlalchemy import select

from core.bases import Catalog
from core.datasets import service as datasets
from core.datasets.repository import DatasetRepository
from core.datasets.service import ValidationPlan
from core.db.session import Database
from core.errors import Conflict, NotFound
from core.jobs import service as jobs
from core.models import Dataset, Job, OutboxMessage, Tenant
from tests.races import race
from tests.rows import LEASE, expire, make_dataset, make_job, make_tenant, settle


def uploaded(database: Database) -> Dataset:
    with database.write() as session:
        return make_dataset(session, make_tenant(session), "uploaded")


def claim(database: Database, worker: str = "v") -> ValidationPlan:
    with database.write() as session:
        plan = datasets.claim(session, worker, LEASE)
    assert plan is not None
    return plan


def found(database: Database, dataset: Dataset) -> Dataset:
    with database.read() as session:
        return session.get_one(Dataset, dataset.id)


def taken_over(database: Database, plan: ValidationPlan) -> ValidationPlan:
    with database.write() as session:
        expire(session, Dataset, plan.dataset_id)
    with database.write() as session:
        assert datasets.claim(session, "too early", LEASE) is None, "only the sweep takes back: it counts the crash"
        assert datasets.sweep(session, 10)
    return claim(database, "another")


def test_an_upload_is_promised_its_validation(database: Database) -> None:
    dataset = uploaded(database)
    with database.read() as session:
        (message,) = session.scalars(select(OutboxMessage)).all()
    assert (message.topic, message.payload) == ("dataset.validate", {"dataset_id": dataset.id})
    assert dataset.object_key == f"{dataset.tenant_id}/datasets/{dataset.id}/archive"


def test_a_verdict_is_written_once_with_all_that_it_says(database: Database) -> None:
    dataset = uploaded(database)
    plan = claim(database)
    with database.write() as session:
        assert datasets.claim(session, "another", LEASE) is None
        assert settle(session, plan)
        assert settle(session, plan, "error") is False
        assert datasets.claim(session, "another", LEASE) is None
    row = found(database, dataset)
    assert (row.status, row.images, row.rejected, row.pack_key, row.report_key) == (
        "processed",
        32,
        0,
        "pack",
        "report",
    )
    assert row.classes == [{"name": "a", "count": 20}, {"name": "b", "count": 12}]
    assert row.lease_until is None


def test_the_oldest_upload_is_validated_first(database: Database) -> None:
    made = [uploaded(database).id for _ in range(3)]
    assert [claim(database).dataset_id for _ in made] == made


LATE: dict[str, Any] = {
    "extend": lambda session, plan: datasets.extend(session, plan, 999),
    "finish_validation": settle,
    "give_up": lambda session, plan: datasets.give_up(session, plan, code="late", detail="late"),
    "release": lambda session, plan: datasets.release(session, plan),
    "interrupt": lambda session, plan: datasets.interrupt(session, plan, 3),
}


@pytest.mark.parametrize("verb", LATE)
def test_a_late_attempt_writes_nothing(database: Database, verb: str) -> None:
    dataset = uploaded(database)
    late = claim(database)
    newer = taken_over(database, late)
    before = found(database, dataset)
    with database.write() as session:
        assert not LATE[verb](session, late)
    after = found(database, dataset)
    assert [getattr(after, c.key) for c in Dataset.__table__.columns] == [
        getattr(before, c.key) for c in Dataset.__table__.columns
    ]
    assert (newer.attempt, after.worker) == (2, "another")


def test_a_file_that_kills_its_workers_is_given_up(database: Database) -> None:
    dataset = uploaded(database)
    for crash in range(1, 4):
        plan = claim(database)
        with database.write() as session:
            expire(session, Dataset, plan.dataset_id)
        with database.write() as session:
            assert datasets.sweep(session, 3) is (crash < 3)
    row = found(database, dataset)
    assert (row.status, row.error_code, row.attempt) == ("error", "crashed", 3)


def test_a_file_whose_process_is_killed_each_time_is_given_up(database: Database, catalog: Catalog) -> None:
    dataset = uploaded(database)
    with database.write() as session:
        job_id = make_job(session, session.get_one(Tenant, dataset.tenant_id), catalog, dataset).id
    for kill in range(1, 4):
        plan = claim(database)
        with database.write() as session:
            assert datasets.interrupt(session, plan, 3)
            assert not datasets.interrupt(session, plan, 3), "a commit whose answer was lost is tried again"
            assert datasets.sweep(session, 3) is (kill < 3)
    row = found(database, dataset)
    assert (row.status, row.error_code, row.crashes, row.attempt) == ("error", "crashed", 3, 3)
    with database.read() as session:
        assert session.get_one(Job, job_id).status == "failed"


def test_a_file_that_was_put_back_stands_in_nobodys_way(database: Database) -> None:
    first = uploaded(database)
    for _ in range(5):
        with database.write() as session:
            plan = datasets.claim(session, "v", LEASE)
            assert plan is not None
            assert plan.dataset_id == first.id
            datasets.release(session, plan)
    others = [uploaded(database).id for _ in range(2)]
    assert [claim(database).dataset_id for _ in range(3)] == [*others, first.id]


def test_an_outage_is_not_the_files_failure(database: Database) -> None:
    dataset = uploaded(database)
    for _ in range(6):
        plan = claim(database)
        with database.write() as session:
            datasets.release(session, plan)
            assert datasets.sweep(session, 3)
    row = found(database, dataset)
    assert (row.status, row.crashes, row.attempt) == ("uploaded", 0, 6)


def test_a_deleted_file_is_gone_for_everyone_and_not_validated(database: Database) -> None:
    dataset = uploaded(database)
    with database.write() as session:
        datasets.delete_dataset(session, dataset.tenant_id, dataset.id)
        repository = DatasetRepository(session, dataset.tenant_id)
        with pytest.raises(NotFound):
            repository.get(dataset.id)
        with pytest.raises(NotFound):
            datasets.delete_dataset(session, dataset.tenant_id, dataset.id)
        assert repository.list_newest(None, 10).rows == []
        assert datasets.claim(session, "v", LEASE) is None
        assert datasets.sweep(session, 3) is False


def test_a_file_that_an_unfinished_job_needs_stays(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant)
        job = make_job(session, tenant, catalog, dataset)
        with pytest.raises(Conflict, match=job.id) as refused:
            datasets.delete_dataset(session, tenant.id, dataset.id)
        assert refused.value.code == "file_in_use"
        jobs.cancel_job(session, tenant.id, job.id)
        datasets.delete_dataset(session, tenant.id, dataset.id)


def test_another_tenants_file_is_not_there(database: Database) -> None:
    dataset = uploaded(database)
    with database.write() as session:
        other = make_tenant(session)
        with pytest.raises(NotFound):
            datasets.delete_dataset(session, other.id, dataset.id)
        with pytest.raises(NotFound) as refused:
            DatasetRepository(session, other.id).list_newest(dataset.id, 10)
        assert refused.value.pointer == "/after"


def test_each_file_is_claimed_once_however_many_workers_reach_for_it(database: Database) -> None:
    made = {uploaded(database).id for _ in range(10)}

    def work() -> list[str]:
        claimed: list[str] = []
        for _ in range(10):
            with database.write() as session:
                if plan := datasets.claim(session, "v", LEASE):
                    claimed.append(plan.dataset_id)
        return claimed

    claimed = [dataset_id for mine in race(work, work, work, work) for dataset_id in mine]
    assert len(claimed) == 10
    assert set(claimed) == made
