from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import StatementError

from core.bases import Catalog
from core.datasets import service as datasets
from core.db.session import Database
from core.errors import Conflict, Invalid, NotFound, OverQuota
from core.jobs import attempts, upkeep
from core.jobs import service as jobs
from core.jobs.queue import positions
from core.jobs.repository import JobRepository
from core.models import Adapter, Checkpoint, Job, JobEvent, JobMetric, OutboxMessage, Preview, Tenant
from tests.rows import (
    LEASE,
    adapter_for,
    base_of,
    claim_job,
    expire,
    make_checkpoint,
    make_dataset,
    make_job,
    make_tenant,
    report_step,
    settle,
)


def job_of(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return session.get_one(Job, job_id)


def messages_of(database: Database, job_id: str) -> list[str]:
    with database.read() as session:
        query = select(JobEvent.message).where(JobEvent.job_id == job_id).order_by(JobEvent.id)
        return list(session.scalars(query))


def start(database: Database, catalog: Catalog, **given: Any) -> attempts.Plan:
    """A tenant's job that a worker holds."""
    with database.write() as session:
        make_job(session, make_tenant(session), catalog, **given)
        return claim_job(session, catalog)


def taken_over(database: Database, catalog: Catalog, plan: attempts.Plan) -> attempts.Plan:
    """The worker falls silent, upkeep takes the job back, another worker claims it."""
    with database.write() as session:
        expire(session, Job, plan.job_id)
    with database.write() as session:
        assert upkeep.sweep(session, max_crashes=10)
        return claim_job(session, catalog, "another")


# --- what a tenant asks for


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
        assert attempts.claim(session, "w", LEASE, catalog) is None
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
        assert attempts.claim(session, "w", LEASE, catalog) is None
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


def test_a_paused_job_goes_on_from_its_checkpoint(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        assert make_checkpoint(session, plan, 5, "at-five")
        jobs.pause_job(session, plan.tenant_id, plan.job_id)
        assert attempts.stop(session, plan, report_step(session, plan, 6))
        assert attempts.claim(session, "w", LEASE, catalog) is None
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


# --- what a worker may write


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
        assert attempts.is_waiting(session, catalog) is False
        assert attempts.claim(session, "w", LEASE, catalog) is None


def test_the_numeric_path_is_written_once(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        assert attempts.fix_numeric_path(session, plan, {"threads": 1})
        assert attempts.fix_numeric_path(session, plan, {"threads": 2}) is False
        assert attempts.yield_back(session, plan)
    with database.write() as session:
        assert claim_job(session, catalog).numeric_path == {"threads": 1}


def test_a_finished_job_has_its_adapter_and_both_are_one_transaction(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with pytest.raises((TypeError, StatementError)), database.write() as session:
        attempts.finish(session, plan, adapter_for(plan), {"not": {"json"}})
    assert job_of(database, plan.job_id).status == "running"
    adapter = adapter_for(plan)
    with database.write() as session:
        assert attempts.finish(session, plan, adapter, {"loss": 0.1})
    job = job_of(database, plan.job_id)
    assert (job.status, job.adapter_id, job.lease_until, job.phase) == ("succeeded", adapter.id, None, None)
    with database.write() as session:
        assert attempts.finish(session, plan, adapter_for(plan, "again"), {}) is False
        assert attempts.fail(session, plan, code="late", message="late") is False
        with pytest.raises(Conflict):
            jobs.cancel_job(session, plan.tenant_id, plan.job_id)
    with database.read() as session:
        assert [row.id for row in session.scalars(select(Adapter))] == [adapter.id]


def test_a_step_passed_twice_leaves_one_metric_and_one_preview(database: Database, catalog: Catalog) -> None:
    first = start(database, catalog)
    preview: dict[str, Any] = {"key": "k", "sha256": "4" * 64, "size": 3, "classes": ["a"], "seeds": [1]}
    with database.write() as session:
        attempts.add_metric(session, first, 1, {"train_loss": 0.5, "total_steps": 10})
        assert attempts.add_preview(session, first, step=1, **preview)
    second = taken_over(database, catalog, first)
    with database.write() as session:
        attempts.add_metric(session, second, 1, {"train_loss": 0.7, "total_steps": 10})
        assert attempts.add_preview(session, second, step=1, **preview) is False
        assert make_checkpoint(session, second, 1)
        assert make_checkpoint(session, second, 1, "anew")
    with database.read() as session:
        assert [row.data["train_loss"] for row in session.scalars(select(JobMetric))] == [0.5]
        assert len(session.scalars(select(Preview)).all()) == 1
        assert [row.object_key for row in session.scalars(select(Checkpoint))] == ["anew"]


WRITES: dict[str, Any] = {
    "report": lambda session, plan: report_step(session, plan, 9).held,
    "standing": lambda session, plan: attempts.standing(session, plan).held,
    "extend": lambda session, plan: attempts.extend(session, plan, 999),
    "fix_numeric_path": lambda session, plan: attempts.fix_numeric_path(session, plan, {"late": True}),
    "halve_micro_batch": lambda session, plan: attempts.halve_micro_batch(session, plan, {"micro_batch": 1}, 0),
    "add_metric": lambda session, plan: attempts.add_metric(session, plan, 9, {"train_loss": 1.0}),
    "add_checkpoint": lambda session, plan: make_checkpoint(session, plan, 9),
    "drop_checkpoint": lambda session, plan: attempts.drop_checkpoint(session, plan),
    "add_preview": lambda session, plan: attempts.add_preview(
        session, plan, step=9, key="k", sha256="5" * 64, size=1, classes=[], seeds=[]
    ),
    "yield_back": lambda session, plan: attempts.yield_back(session, plan),
    "stop": lambda session, plan: attempts.stop(session, plan, attempts.Standing(held=True, cancel=True)),
    "finish": lambda session, plan: attempts.finish(session, plan, adapter_for(plan), {}),
    "fail": lambda session, plan: attempts.fail(session, plan, code="late", message="late"),
    "put_back": lambda session, plan: attempts.put_back(session, plan, "late", 3),
}


def everything(database: Database) -> list[Any]:
    with database.read() as session:
        tables = (Job, JobEvent, JobMetric, Checkpoint, Preview, Adapter, OutboxMessage, Tenant)
        return [
            {column.name: getattr(row, column.key) for column in table.__table__.columns}
            for table in tables
            for row in session.scalars(select(table).order_by(table.id))
        ]


@pytest.mark.parametrize("verb", WRITES)
def test_a_late_attempt_writes_nothing(database: Database, catalog: Catalog, verb: str) -> None:
    late = start(database, catalog)
    with database.write() as session:
        make_checkpoint(session, late, 4)
    taken_over(database, catalog, late)
    before = everything(database)
    with database.write() as session:
        assert not WRITES[verb](session, late)
    assert everything(database) == before


def test_every_verb_of_a_worker_is_tried_by_a_late_attempt() -> None:
    takes_a_plan = {
        name
        for name, verb in vars(attempts).items()
        if callable(verb) and not name.startswith("_") and "plan" in getattr(verb, "__annotations__", {})
    }
    assert takes_a_plan - {"is_held"} == set(WRITES)


# --- what upkeep does


def test_a_silent_workers_job_is_queued_again_from_its_checkpoint(database: Database, catalog: Catalog) -> None:
    first = start(database, catalog)
    with database.write() as session:
        assert make_checkpoint(session, first, 4, "at-four")
        assert upkeep.sweep(session, 3) is False
    assert job_of(database, first.job_id).status == "running"
    second = taken_over(database, catalog, first)
    assert second.checkpoint is not None
    assert (second.attempt, second.checkpoint.key) == (2, "at-four")
    assert "going on from the last checkpoint" in messages_of(database, first.job_id)[-1]


def test_a_job_that_crashes_without_progress_is_given_up_at_the_limit(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    for crash in range(1, 4):
        with database.write() as session:
            assert report_step(session, plan, 2).held  # steps alone are no progress: they are lost again
            expire(session, Job, plan.job_id)
        with database.write() as session:
            assert upkeep.sweep(session, 3) is (crash < 3)
            if crash < 3:
                plan = claim_job(session, catalog)
    job = job_of(database, plan.job_id)
    assert (job.status, job.attempt, job.error and job.error["code"]) == ("failed", 3, "crashed")


def test_a_new_checkpoint_clears_the_count_of_crashes(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    for step in range(1, 6):
        with database.write() as session:
            assert make_checkpoint(session, plan, step)
            expire(session, Job, plan.job_id)
        with database.write() as session:
            assert upkeep.sweep(session, 2)
            plan = claim_job(session, catalog)
    assert plan.attempt == 6


def test_a_shutdown_is_nobodys_failure(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    for _ in range(5):
        with database.write() as session:
            assert attempts.yield_back(session, plan)
            plan = claim_job(session, catalog)
    assert job_of(database, plan.job_id).crashes == 0


@pytest.mark.parametrize(("verb", "status"), [("cancel_job", "cancelled"), ("pause_job", "paused")])
def test_cancelled_or_paused_and_then_crashed_is_not_tried_again(
    database: Database, catalog: Catalog, verb: str, status: str
) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        getattr(jobs, verb)(session, plan.tenant_id, plan.job_id)
        expire(session, Job, plan.job_id)
    with database.write() as session:
        assert upkeep.sweep(session, 3) is False
        assert attempts.claim(session, "w", LEASE, catalog) is None
    assert job_of(database, plan.job_id).status == status


def test_a_job_that_is_put_back_counts_as_a_crash(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        assert attempts.put_back(session, plan, "the store is away", 2)
        assert attempts.put_back(session, claim_job(session, catalog), "the store is away", 2)
    job = job_of(database, plan.job_id)
    assert (job.status, job.error and job.error["code"]) == ("failed", "crashed")


def test_an_unreadable_checkpoint_makes_way_for_the_one_before(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        for step in (2, 4):
            make_checkpoint(session, plan, step, f"at-{step}")
        previous = attempts.drop_checkpoint(session, plan)
        assert previous is not None
        assert previous.key == "at-2"
    with database.write() as session:
        assert attempts.drop_checkpoint(session, plan) is None
        assert attempts.drop_checkpoint(session, plan) is None
        assert session.scalars(select(Checkpoint)).all() == []
        assert session.get_one(Job, plan.job_id).checkpoint_id is None


def test_old_checkpoints_never_hold_the_one_that_a_resume_needs(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        for step in range(1, 6):
            make_checkpoint(session, plan, step)
        oldest = session.scalars(select(Checkpoint).where(Checkpoint.step == 1)).one()
        session.get_one(Job, plan.job_id).checkpoint_id = oldest.id
    with database.read() as session:
        assert sorted(row.step for row in upkeep.old_checkpoints(session, keep=2)) == [2, 3]


# --- fairness


def test_the_tenant_that_used_the_device_least_goes_first(database: Database, catalog: Catalog) -> None:
    """Three jobs each of two tenants, one twice as slow: device time stays level, not the number of claims."""
    with database.write() as session:
        slow, quick = make_tenant(session, "slow"), make_tenant(session, "quick")
        for tenant in (slow, slow, slow, quick, quick, quick):
            make_job(session, tenant, catalog)
    order: list[str] = []
    for _ in range(6):
        with database.write() as session:
            plan = claim_job(session, catalog)
            order.append("slow" if plan.tenant_id == slow.id else "quick")
            report_step(session, plan, 1, seconds=20.0 if plan.tenant_id == slow.id else 9.0)
            assert attempts.yield_back(session, plan)
    assert order == ["slow", "quick", "quick", "quick", "slow", "quick"]


def test_each_tenant_has_a_job_running_before_any_has_two(database: Database, catalog: Catalog) -> None:
    """Those who are claimed for one pass, before any of them is charged."""
    with database.write() as session:
        many, few = make_tenant(session, "many"), make_tenant(session, "few")
        attempts.charge(session, few.id, 5.0)
        made = [make_job(session, tenant, catalog).id for tenant in (many, many, many, few, few)]
        shown = positions(session, made)
        claimed = [claim_job(session, catalog).job_id for _ in made]
    assert claimed == [made[0], made[3], made[1], made[4], made[2]]
    assert shown == {job_id: claimed.index(job_id) + 1 for job_id in made}


def test_a_worker_takes_the_first_job_that_fits(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        first, second = (make_job(session, tenant, catalog).id for _ in range(2))
    with database.write() as session:
        assert attempts.is_waiting(session, catalog, lambda job: job.id == second)
        plan = attempts.claim(session, "w", LEASE, catalog, lambda job: job.id == second)
        assert plan is not None
        assert plan.job_id == second
        assert not attempts.is_waiting(session, catalog, lambda job: job.id == second)
        assert attempts.claim(session, "w", LEASE, catalog, lambda job: job.id == second) is None
        assert claim_job(session, catalog).job_id == first


def test_a_tenants_own_jobs_run_oldest_first(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        made = [make_job(session, tenant, catalog).id for _ in range(3)]
    with database.write() as session:
        assert [claim_job(session, catalog).job_id for _ in made] == made


def test_a_late_comer_starts_level_and_does_not_own_the_device(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        early = make_tenant(session, "early")
        make_job(session, early, catalog)
        make_job(session, early, catalog)
        report_step(session, claim_job(session, catalog), 1, seconds=1000.0)
        late = make_tenant(session, "late")
        make_job(session, late, catalog)
    with database.read() as session:
        used = {tenant.name: tenant.device_seconds for tenant in session.scalars(select(Tenant))}
    assert used == {"early": 1000.0, "late": 1000.0}


def test_a_level_is_never_lowered(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        heavy, light = make_tenant(session, "heavy"), make_tenant(session, "light")
        attempts.charge(session, heavy.id, 500.0)
        make_job(session, light, catalog)
        make_job(session, heavy, catalog)
    with database.read() as session:
        assert session.get_one(Tenant, heavy.id).device_seconds == 500.0


def test_an_unresolvable_job_fails_and_the_next_one_is_claimed(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant)
        bad, good = (make_job(session, tenant, catalog, dataset) for _ in range(2))
        bad.spec, bad.request = None, {"steps": "many"}
    with database.write() as session:
        assert claim_job(session, catalog).job_id == good.id
    assert job_of(database, bad.id).status == "failed"


def test_pages_hold_a_tenants_jobs_newest_first(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        made = [make_job(session, tenant, catalog).id for _ in range(5)]
    with database.read() as session:
        repository = JobRepository(session, tenant.id)
        seen: list[str] = []
        after: str | None = None
        while True:
            page = repository.list_newest(after, 2)
            seen += [row.id for row in page.rows]
            if not page.has_more:
                break
            after = seen[-1]
    assert seen == made[::-1]
    assert base_of(catalog).name == "tiny-dit"


def test_a_job_waits_for_a_worker_that_has_its_devices(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        two = make_job(session, tenant, catalog, hyperparameters={"steps": 10, "devices": 2}).id
        one = make_job(session, tenant, catalog).id
    with database.write() as session:
        plan = attempts.claim(session, "w", LEASE, catalog)
        assert plan is not None
        assert plan.job_id == one
        assert not attempts.is_waiting(session, catalog)
        assert attempts.claim(session, "w", LEASE, catalog) is None
        assert attempts.is_waiting(session, catalog, devices=2)
        plan = attempts.claim(session, "w", LEASE, catalog, devices=2)
        assert plan is not None
        assert (plan.job_id, plan.spec.devices) == (two, 2)
