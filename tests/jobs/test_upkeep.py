"""Jobs whose workers fell silent."""

import pytest
from sqlalchemy import select

from core.bases import Catalog
from core.db.session import Database
from core.jobs import claims, upkeep
from core.jobs import service as jobs
from core.models import Checkpoint, Job
from tests.jobs.held import job_of, messages_of, start, taken_over
from tests.races import race
from tests.rows import (
    LEASE,
    claim_job,
    expire,
    make_checkpoint,
    report_step,
)


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
        assert claims.claim(session, "w", LEASE, catalog) is None
    assert job_of(database, plan.job_id).status == status


def test_old_checkpoints_never_hold_the_one_that_a_resume_needs(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        for step in range(1, 6):
            make_checkpoint(session, plan, step)
        oldest = session.scalars(select(Checkpoint).where(Checkpoint.step == 1)).one()
        session.get_one(Job, plan.job_id).checkpoint_id = oldest.id
    with database.read() as session:
        assert sorted(row.step for row in upkeep.old_checkpoints(session, keep=2)) == [2, 3]


def test_three_sweeps_at_once_count_one_crash(database: Database, catalog: Catalog) -> None:
    plan = start(database, catalog)
    with database.write() as session:
        expire(session, Job, plan.job_id)

    def sweep() -> None:
        with database.write() as session:
            upkeep.sweep(session, 3)

    race(sweep, sweep, sweep)
    job = job_of(database, plan.job_id)
    assert (job.status, job.crashes, job.attempt) == ("queued", 1, 1)
