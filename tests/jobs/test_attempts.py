"""What a worker may do with a job that it has claimed: write to it while it holds it, give it up."""

from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import StatementError

from core.bases import Catalog
from core.db.session import Database
from core.errors import Conflict
from core.jobs import attempts
from core.jobs import service as jobs
from core.models import Adapter, Checkpoint, Job, JobEvent, JobMetric, OutboxMessage, Preview, Tenant
from core.training.path import NumericPath
from tests.jobs.held import job_of, start, taken_over
from tests.rows import (
    adapter_for,
    claim_job,
    make_checkpoint,
    report_step,
)

PATH = NumericPath("2.9.0", "cpu", 1, "float32", "row", 4).to_json()


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
