"""How a worker comes by a job: the first that it can read, that fits and that its settings allow."""

from typing import Any

import pytest
from sqlalchemy import select, update

from core.bases import Catalog
from core.datasets import service as datasets
from core.db.session import Database
from core.jobs import attempts, claims
from core.models import Job, Tenant
from core.training.path import NumericPath
from tests.jobs.held import job_of, start
from tests.rows import (
    LEASE,
    claim_job,
    make_dataset,
    make_job,
    make_tenant,
    settle,
)

PATH = NumericPath("2.9.0", "cpu", 1, "float32", "row", 4).to_json()


def test_a_claim_fixes_the_attempt_and_the_lease(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    job = job_of(database, plan.job_id)
    assert (job.status, job.attempt, job.worker, job.phase) == ("running", 1, "device@test", "preparing")
    assert job.lease_until is not None
    assert job.started_at is not None
    assert 0 < (job.lease_until - job.started_at).total_seconds() <= LEASE
    with database.write() as session:
        assert attempts.extend(session, plan, LEASE * 2)
    extended = job_of(database, plan.job_id).lease_until
    assert extended is not None
    assert extended > job.lease_until


def test_a_job_of_a_base_that_this_worker_lacks_is_not_claimed(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        make_job(session, make_tenant(session), catalog)
        session.scalars(select(Job)).one().model = "another-base"
    with database.write() as session:
        assert claims.is_waiting(session, catalog) is False
        assert claims.claim(session, "w", LEASE, catalog) is None


def test_a_worker_takes_the_first_job_that_fits(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        first, second = (make_job(session, tenant, catalog).id for _ in range(2))
    with database.write() as session:
        assert claims.is_waiting(session, catalog, lambda job: job.id == second)
        plan = claims.claim(session, "w", LEASE, catalog, lambda job: job.id == second)
        assert plan is not None
        assert plan.job_id == second
        assert not claims.is_waiting(session, catalog, lambda job: job.id == second)
        assert claims.claim(session, "w", LEASE, catalog, lambda job: job.id == second) is None
        assert claim_job(session, catalog).job_id == first


def test_an_unresolvable_job_fails_and_the_next_one_is_claimed(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant)
        bad, good = (make_job(session, tenant, catalog, dataset) for _ in range(2))
        bad.spec, bad.request = None, {"steps": "many"}
    with database.write() as session:
        assert claim_job(session, catalog).job_id == good.id
    assert job_of(database, bad.id).status == "failed"


OF_A_NEWER_RELEASE: dict[str, dict[str, Any]] = {
    "a field of the spec": {"spec": {"spin": 1}},
    "a part of the numeric path": {"numeric_path": {**PATH, "spin": 1}},
    "a hyperparameter": {"spec": None, "request": {"steps": 10, "spin": 1}},
    "a choice": {"spec": None, "request": {"class_start": "spun"}},
    "a kind of start": {"start": {"classes": [], "spin": 1}},
}


@pytest.mark.parametrize("written", OF_A_NEWER_RELEASE.values(), ids=OF_A_NEWER_RELEASE)
def test_what_another_release_wrote_stays_queued_and_the_next_job_is_claimed(
    database: Database, catalog: Catalog, written: dict[str, Any]
) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        newer, plain = (make_job(session, tenant, catalog) for _ in range(2))
        for field, value in written.items():
            setattr(newer, field, {**newer.spec, **value} if field == "spec" and newer.spec and value else value)
    with database.write() as session:
        assert claim_job(session, catalog).job_id == plain.id
        assert not claims.is_waiting(session, catalog)
        assert not claims.is_waiting(session, catalog, lambda job: True)
        assert claims.claim(session, "w", LEASE, catalog) is None
    job = job_of(database, newer.id)
    assert (job.status, job.attempt, job.crashes, job.error) == ("queued", 0, 0, None)


def test_what_cannot_be_read_is_not_asked_whether_it_fits(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        newer = make_job(session, make_tenant(session), catalog)
        newer.spec = {**(newer.spec or {}), "spin": 1}
    with database.write() as session:
        assert not claims.is_waiting(session, catalog, lambda job: job.id == newer.id)


def test_however_much_another_release_wrote_the_next_job_is_claimed(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant)
        for _ in range(60):
            newer = make_job(session, tenant, catalog, dataset)
            newer.spec = {**(newer.spec or {}), "spin": 1}
        plain = make_job(session, tenant, catalog, dataset).id
    claimed: list[str] = []
    for _ in range(2):  # there are more than are looked at at once
        with database.write() as session:
            plan = claims.claim(session, "w", LEASE, catalog)
        claimed += [plan.job_id] if plan else []
    assert claimed == [plain]


def test_a_job_waits_for_a_worker_that_has_its_devices(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        two = make_job(session, tenant, catalog, hyperparameters={"steps": 10, "devices": 2}).id
        one = make_job(session, tenant, catalog).id
    with database.write() as session:
        plan = claims.claim(session, "w", LEASE, catalog)
        assert plan is not None
        assert plan.job_id == one
        assert not claims.is_waiting(session, catalog)
        assert claims.claim(session, "w", LEASE, catalog) is None
        assert claims.is_waiting(session, catalog, devices=2)
        plan = claims.claim(session, "w", LEASE, catalog, devices=2)
        assert plan is not None
        assert (plan.job_id, plan.spec.devices) == (two, 2)


def make_early_job(database: Database, catalog: Catalog, max_steps: int, **hyperparameters: float) -> str:
    """Created under that limit while its file, of 32 images, was still being looked at; queued by now."""
    with database.write() as session:
        dataset = make_dataset(session, make_tenant(session), "uploaded")
        tenant = session.get_one(Tenant, dataset.tenant_id)
        job = make_job(session, tenant, catalog, dataset, hyperparameters=hyperparameters, max_steps=max_steps)
    with database.write() as session:
        validation = datasets.claim(session, "v", LEASE)
        assert validation is not None
        settle(session, validation)
    return job.id


def claim(database: Database, catalog: Catalog, max_steps: int) -> claims.Plan | None:
    with database.write() as session:
        return claims.claim(session, "w", LEASE, catalog, max_steps=max_steps)


def test_epochs_that_come_to_more_steps_than_the_settings_allow_fail_at_the_claim(
    database: Database, catalog: Catalog
) -> None:
    job_id = make_early_job(database, catalog, 1_000, n_epochs=400.0)  # few steps of the two images that it guessed
    assert claim(database, catalog, max_steps=1_000) is None
    job = job_of(database, job_id)
    assert (job.status, (job.error or {})["code"]) == ("failed", "invalid")
    assert "at most 1000" in (job.error or {})["message"]
    assert (job.error or {})["param"] == "method.difffit.hyperparameters.n_epochs"


def test_steps_that_the_settings_allow_are_not_refused_at_the_claim(database: Database, catalog: Catalog) -> None:
    make_early_job(database, catalog, 50_000, steps=30_000)
    plan = claim(database, catalog, max_steps=50_000)
    assert plan is not None
    assert plan.spec.steps == 30_000


def test_a_job_that_fails_at_its_claim_names_the_field_as_replies_do(database: Database, catalog: Catalog) -> None:
    job_id = make_early_job(database, catalog, 1_000, steps=10)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(base_fingerprint="of another base"))
    assert claim(database, catalog, max_steps=1_000) is None
    assert (job_of(database, job_id).error or {})["param"] == "model"
