import pytest
from sqlalchemy import select

from core.bases import Catalog
from core.datasets import service as datasets
from core.db.session import Database
from core.errors import Conflict, Invalid, NotFound, OverQuota
from core.jobs import attempts, claims
from core.jobs import service as jobs
from core.jobs.repository import JobRepository
from core.models import Adapter, Job, OutboxMessage, Tenant
from tests.jobs.held import job_of, start
from tests.rows import (
    LEASE,
    adapter_for,
    claim_job,
    make_checkpoint,
    make_dataset,
    make_job,
    make_tenant,
    report_step,
    settle,
)


def test_a_job_on_a_validated_file_is_queued_with_its_spec_and_a_nudge(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        job = make_job(session, make_tenant(session), catalog)
    found = job_of(database, job.id)
    assert (found.status, found.spec and found.spec["steps"]) == ("queued", 10)
    with database.read() as session:
        nudges = session.scalars(select(OutboxMessage).where(OutboxMessage.topic == "job.train")).all()
        assert [nudge.payload for nudge in nudges] == [{"job_id": job.id}]


def test_a_job_waits_for_its_file_and_is_resolved_when_it_is_claimed(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        dataset = make_dataset(session, make_tenant(session), "uploaded")
        tenant = session.get_one(Tenant, dataset.tenant_id)
        job = make_job(session, tenant, catalog, dataset)
        assert (job.status, job.spec) == ("validating_files", None)
        assert claims.claim(session, "w", LEASE, catalog) is None
    with database.write() as session:
        validation = datasets.claim(session, "v", LEASE)
        assert validation is not None
        settle(session, validation)
    with database.write() as session:
        assert claim_job(session, catalog).spec.steps == 10
    assert job_of(database, job.id).spec is not None


@pytest.mark.parametrize("paused", [False, True])
def test_a_job_fails_with_its_files_reason(database: Database, catalog: Catalog, paused: bool) -> None:
    with database.write() as session:
        dataset = make_dataset(session, make_tenant(session), "uploaded")
        job = make_job(session, session.get_one(Tenant, dataset.tenant_id), catalog, dataset)
        if paused:
            jobs.pause_job(session, dataset.tenant_id, job.id)
    with database.write() as session:
        validation = datasets.claim(session, "v", LEASE)
        assert validation is not None
        settle(session, validation, "error", "no_images")
    found = job_of(database, job.id)
    assert (found.status, found.error and found.error["code"]) == ("failed", "invalid_training_file")
    assert found.finished_at is not None


def test_a_job_paused_before_its_file_is_known_stays_paused_and_resumes(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        dataset = make_dataset(session, make_tenant(session), "uploaded")
        job = make_job(session, session.get_one(Tenant, dataset.tenant_id), catalog, dataset)
        jobs.pause_job(session, dataset.tenant_id, job.id)
        validation = datasets.claim(session, "v", LEASE)
        assert validation is not None
        settle(session, validation)
    assert job_of(database, job.id).status == "paused"
    with database.write() as session:
        assert jobs.resume_job(session, dataset.tenant_id, job.id).status == "queued"
        assert claim_job(session, catalog).job_id == job.id


def test_a_file_that_failed_is_refused_by_name(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant, "error", "no_images")
        with pytest.raises(Conflict, match="no_images") as refused:
            make_job(session, tenant, catalog, dataset)
        assert (refused.value.code, refused.value.pointer) == ("file_not_usable", "/training_file")


def test_another_tenants_file_and_job_are_not_there(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        owner, other = make_tenant(session), make_tenant(session)
        dataset = make_dataset(session, owner)
        job = make_job(session, owner, catalog, dataset)
        with pytest.raises(NotFound) as refused:
            make_job(session, other, catalog, dataset)
        assert refused.value.pointer == "/training_file"
        for verb in (jobs.cancel_job, jobs.pause_job, jobs.resume_job):
            with pytest.raises(NotFound):
                verb(session, other.id, job.id)
        with pytest.raises(NotFound):
            JobRepository(session, other.id).list_events(job.id, None, 10)
        assert JobRepository(session, other.id).list_newest(None, 10).rows == []


def test_a_bad_hyperparameter_is_refused_before_the_file_is_known(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        dataset = make_dataset(session, make_tenant(session), "uploaded")
        tenant = session.get_one(Tenant, dataset.tenant_id)
        with pytest.raises(Invalid) as refused:
            make_job(session, tenant, catalog, dataset, hyperparameters={"steps": -1})
        assert refused.value.pointer == "/method/difffit/hyperparameters/steps"
        assert session.scalars(select(Job)).all() == []


def test_unfinished_jobs_count_toward_the_quota_and_ended_ones_do_not(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant)
        first = make_job(session, tenant, catalog, dataset, max_queued=1)
        with pytest.raises(OverQuota) as refused:
            make_job(session, tenant, catalog, dataset, max_queued=1)
        assert refused.value.code == "too_many_jobs"
        jobs.cancel_job(session, tenant.id, first.id)
        make_job(session, tenant, catalog, dataset, max_queued=1)


def test_a_waiting_job_is_cancelled_at_once_and_never_claimed(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        job = make_job(session, tenant, catalog)
        assert jobs.cancel_job(session, tenant.id, job.id).status == "cancelled"
        assert claims.claim(session, "w", LEASE, catalog) is None
        with pytest.raises(Conflict) as refused:
            jobs.cancel_job(session, tenant.id, job.id)
        assert refused.value.code == "job_ended"


def test_a_running_job_hears_of_its_cancel_and_stops(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        assert report_step(session, plan, 1).goes_on
        assert jobs.cancel_job(session, plan.tenant_id, plan.job_id).phase == "cancelling"
    with database.write() as session:
        heard = report_step(session, plan, 2)
        assert (heard.held, heard.cancel, heard.goes_on) == (True, True, False)
        assert session.get_one(Job, plan.job_id).phase == "cancelling"
        assert attempts.standing(session, plan) == heard
        assert attempts.finish(session, plan, adapter_for(plan), {}) is False
        assert attempts.stop(session, plan, heard)
    assert job_of(database, plan.job_id).status == "cancelled"
    with database.read() as session:
        assert session.scalars(select(Adapter)).all() == []


def test_a_pause_says_no_more_than_what_comes(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        assert jobs.pause_job(session, plan.tenant_id, plan.job_id).phase == "pausing"
        assert attempts.put_back(session, plan, "its worker fell silent", max_crashes=3)
    assert (job_of(database, plan.job_id).status, job_of(database, plan.job_id).phase) == ("paused", None)


def test_a_job_that_will_be_cancelled_does_not_say_that_it_will_pause(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        jobs.cancel_job(session, plan.tenant_id, plan.job_id)
        assert jobs.pause_job(session, plan.tenant_id, plan.job_id).phase == "cancelling"


def test_a_paused_job_goes_on_from_its_checkpoint(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        assert make_checkpoint(session, plan, 5, "at-five")
        jobs.pause_job(session, plan.tenant_id, plan.job_id)
        assert attempts.stop(session, plan, report_step(session, plan, 6))
        assert claims.claim(session, "w", LEASE, catalog) is None
        assert jobs.pause_job(session, plan.tenant_id, plan.job_id).status == "paused"
    with database.write() as session:
        assert jobs.resume_job(session, plan.tenant_id, plan.job_id).status == "queued"
        again = claim_job(session, catalog)
    assert again.checkpoint is not None
    assert (again.attempt, again.checkpoint.key, again.checkpoint.sha256) == (2, "at-five", "2" * 64)


def test_a_pause_that_nobody_carried_out_yet_is_taken_back(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        jobs.pause_job(session, plan.tenant_id, plan.job_id)
        assert jobs.resume_job(session, plan.tenant_id, plan.job_id).status == "running"
        assert report_step(session, plan, 1).goes_on


def test_only_a_paused_job_resumes(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session, pytest.raises(Conflict) as refused:
        jobs.resume_job(session, plan.tenant_id, plan.job_id)
    assert refused.value.code == "job_not_paused"


@pytest.mark.parametrize(("verb", "status"), [("cancel_job", "cancelled"), ("pause_job", "paused")])
def test_what_is_asked_after_the_last_report_is_carried_out_when_the_slice_ends(
    database: Database, catalog: Catalog, verb: str, status: str
) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        getattr(jobs, verb)(session, plan.tenant_id, plan.job_id)
        assert attempts.yield_back(session, plan)
    assert job_of(database, plan.job_id).status == status
