"""What a worker may do with a job: claim it, write to it while it holds it, give it up."""

from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import StatementError

from core.bases import Catalog
from core.datasets import service as datasets
from core.db.session import Database
from core.errors import Conflict
from core.jobs import attempts, claims
from core.jobs import service as jobs
from core.models import Adapter, Checkpoint, Job, JobEvent, JobMetric, OutboxMessage, Preview, Tenant
from core.training.path import NumericPath
from tests.jobs.held import job_of, start, taken_over
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


def test_the_numeric_path_is_written_once(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        assert attempts.fix_numeric_path(session, plan, PATH)
        assert attempts.fix_numeric_path(session, plan, {"threads": 2}) is False
        assert attempts.yield_back(session, plan)
    with database.write() as session:
        assert claim_job(session, catalog).numeric_path == PATH


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


def test_a_shutdown_is_nobodys_failure(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    for _ in range(5):
        with database.write() as session:
            assert attempts.yield_back(session, plan)
            plan = claim_job(session, catalog)
    assert job_of(database, plan.job_id).crashes == 0


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
