"""The states of a job: the table of legal moves, a machine that walks it at random, and claims that race."""

import time
from collections import Counter
from functools import partial
from itertools import product

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import select

from core.bases import Catalog
from core.datasets import service as datasets
from core.db.session import Database
from core.errors import Conflict, NotFound, OverQuota
from core.jobs import attempts, claims, upkeep
from core.jobs import service as jobs
from core.jobs.states import LEGAL, TERMINAL, Status, move
from core.models import Adapter, Dataset, Job, JobEvent
from tests.races import race
from tests.rows import (
    LEASE,
    adapter_for,
    claim_job,
    expire,
    make_checkpoint,
    make_dataset,
    make_job,
    make_tenant,
    report_step,
    settle,
)

MAX_CRASHES = 3


@pytest.mark.parametrize(
    ("source", "target"), [(a, b) for a, b in product(Status, Status) if b not in LEGAL.get(a, ())]
)
def test_an_illegal_move_is_a_bug_and_says_so(source: Status, target: Status, sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.write() as session, pytest.raises(ValueError, match=f"no job goes from {source} to {target}"):
        move(session, "ftjob-any", source, target)
    database.close()


def test_every_state_but_the_last_ones_can_be_left_and_be_cancelled() -> None:
    assert set(LEGAL) == set(Status) - TERMINAL
    assert all(Status.cancelled in targets for targets in LEGAL.values())


class JobMachine(RuleBasedStateMachine):
    """Tenants, workers and upkeep act in any order on one job. Stale workers keep their plans and go on trying."""

    database: Database
    catalog: Catalog

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[claims.Plan] = []
        self.history: list[str] = []

    @initialize(validated=st.booleans())
    def submit(self, validated: bool) -> None:
        with self.database.write() as session:
            for row in session.scalars(select(Job).where(Job.status.not_in(TERMINAL))):
                row.status = "cancelled"  # what an earlier run of the machine left must not be claimed by this one
            for row in session.scalars(select(Dataset).where(Dataset.status == "uploaded")):
                row.status = "error"
        with self.database.write() as session:
            tenant = make_tenant(session)
            dataset = make_dataset(session, tenant, "processed" if validated else "uploaded")
            self.job_id = make_job(session, tenant, self.catalog, dataset).id
            self.tenant_id = tenant.id
        self._note()

    @rule(verdict=st.sampled_from(["processed", "error"]))
    def validate(self, verdict: str) -> None:
        with self.database.write() as session:
            if plan := datasets.claim(session, "v", LEASE):
                settle(session, plan, verdict)
        self._note()

    @rule(verb=st.sampled_from([jobs.cancel_job, jobs.pause_job, jobs.resume_job]))
    def ask(self, verb: object) -> None:
        assert callable(verb)
        try:
            with self.database.write() as session:
                verb(session, self.tenant_id, self.job_id)
        except Conflict:
            pass
        self._note()

    @rule()
    def claim(self) -> None:
        with self.database.write() as session:
            if plan := claims.claim(session, "w", LEASE, self.catalog):
                self.plans.append(plan)
        self._note()

    @rule(which=st.integers(0, 9), step=st.integers(1, 9), checkpoint=st.booleans())
    def train(self, which: int, step: int, checkpoint: bool) -> None:
        """A worker, maybe a stale one, reports; it stops when it is told to."""
        if (plan := self._plan(which)) is None:
            return
        with self.database.write() as session:
            standing = report_step(session, plan, step)
            assert standing.held == self._is_newest(plan, session.get_one(Job, self.job_id))
            if checkpoint:
                assert make_checkpoint(session, plan, step, f"{plan.attempt}") == standing.held
            if standing.held and not standing.goes_on:
                assert attempts.stop(session, plan, standing)
        self._note()

    @rule(which=st.integers(0, 9), end=st.sampled_from(["yield_back", "fail", "finish", "put_back"]))
    def end(self, which: int, end: str) -> None:
        if (plan := self._plan(which)) is None:
            return
        with self.database.write() as session:
            held = self._is_newest(plan, session.get_one(Job, self.job_id))
            if end == "yield_back":
                done = attempts.yield_back(session, plan)
            elif end == "fail":
                done = attempts.fail(session, plan, code="diverged", message="NaN")
            elif end == "put_back":
                done = attempts.put_back(session, plan, "outage", MAX_CRASHES)
            else:
                held = held and not session.get_one(Job, self.job_id).cancel_requested
                done = attempts.finish(session, plan, adapter_for(plan), {})
            assert done == held
        self._note()

    @rule()
    def crash_and_sweep(self) -> None:
        with self.database.write() as session:
            if session.get_one(Job, self.job_id).status == Status.running:
                expire(session, Job, self.job_id)
        with self.database.write() as session:
            upkeep.sweep(session, MAX_CRASHES)
        self._note()

    @invariant()
    def agrees_with_its_rows(self) -> None:
        if not self.history:
            return
        with self.database.read() as session:
            job = session.get_one(Job, self.job_id)
            adapters = session.scalars(select(Adapter).where(Adapter.job_id == job.id)).all()
            assert len(adapters) == (1 if job.status == Status.succeeded else 0)
            assert (job.lease_until is not None) == (job.status == Status.running)
            assert (job.finished_at is not None) == (job.status in TERMINAL)
            assert (job.error is not None) == (job.status == Status.failed)
            assert job.crashes < MAX_CRASHES
            assert job.attempt == len(self.plans)
            assert session.scalars(select(JobEvent.id).where(JobEvent.job_id == job.id)).all()

    def _plan(self, which: int) -> claims.Plan | None:
        return self.plans[-1 - which % len(self.plans)] if self.plans else None

    def _is_newest(self, plan: claims.Plan, job: Job) -> bool:
        return job.status == Status.running and job.attempt == plan.attempt

    def _note(self) -> None:
        """Every step of the machine is one move at most, or two that are each legal."""
        with self.database.read() as session:
            status = session.get_one(Job, self.job_id).status
        if not self.history or self.history[-1] != status:
            if self.history:
                before = Status(self.history[-1])
                reachable = LEGAL.get(before, frozenset())
                assert Status(status) in reachable, f"{before} became {status}"
            self.history.append(status)


def test_whatever_happens_in_whatever_order_only_legal_moves_are_made(database: Database, catalog: Catalog) -> None:
    machine = type("Machine", (JobMachine,), {"database": database, "catalog": catalog})
    run_state_machine_as_test(
        machine,
        settings=hypothesis_settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_each_job_is_claimed_once_however_many_workers_reach_for_it(database: Database, catalog: Catalog) -> None:
    workers, rounds = 8, 3
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant)
        made = {make_job(session, tenant, catalog, dataset).id for _ in range(workers * rounds)}

    def work() -> list[str]:
        claimed: list[str] = []
        for _ in range(rounds * workers):
            with database.write() as session:
                if plan := claims.claim(session, "w", LEASE, catalog):
                    claimed.append(plan.job_id)
        return claimed

    claimed = Counter(job_id for mine in race(*[work] * workers) for job_id in mine)
    assert claimed == dict.fromkeys(made, 1)
    with database.read() as session:
        assert {job.attempt for job in session.scalars(select(Job))} == {1}


@pytest.mark.parametrize("rival", ["finish", "yield_back", "sweep"])
def test_cancel_against_a_worker_ends_in_one_state(database: Database, catalog: Catalog, rival: str) -> None:
    """A success keeps its adapter and refuses the cancel, a cancel leaves none; never both."""
    for _ in range(20):
        with database.write() as session:
            tenant = make_tenant(session)
            make_job(session, tenant, catalog)
            plan = claim_job(session, catalog)
            if rival == "sweep":
                expire(session, Job, plan.job_id)
        cancelled, worked = race(partial(_cancel, database, plan), partial(_end, database, plan, rival))
        with database.write() as session:
            job = session.get_one(Job, plan.job_id)
            if job.status == Status.running:  # the cancel came first, so the worker was refused and now stops
                assert (cancelled, worked) == ("running", False)
                standing = attempts.standing(session, plan)
                assert standing.cancel
                assert attempts.stop(session, plan, standing)
            session.refresh(job)
            adapters = session.scalars(select(Adapter).where(Adapter.job_id == job.id)).all()
        expected = ("succeeded", 1) if cancelled == "job_ended" else ("cancelled", 0)
        assert (job.status, len(adapters)) == expected


def _cancel(database: Database, plan: claims.Plan) -> str:
    try:
        with database.write() as session:
            return jobs.cancel_job(session, plan.tenant_id, plan.job_id).status
    except Conflict as error:
        return error.code


def _end(database: Database, plan: claims.Plan, how: str) -> bool:
    with database.write() as session:
        if how == "finish":
            return attempts.finish(session, plan, adapter_for(plan), {})
        return attempts.yield_back(session, plan) if how == "yield_back" else upkeep.sweep(session, MAX_CRASHES)


def test_a_verdict_that_arrives_while_a_job_is_made_does_not_miss_it(database: Database, catalog: Catalog) -> None:
    """Whichever commits first, the job ends up queued."""

    def submit(dataset: Dataset) -> str:
        with database.write() as session:
            base = catalog.all()[0]
            found = jobs.create_job(session, dataset.tenant_id, base, dataset_id=dataset.id, hyperparameters={})
            time.sleep(0.002)  # between the look at the file and the commit
            return found.id

    def validate(plan: datasets.ValidationPlan) -> bool:
        with database.write() as session:
            return settle(session, plan)

    for _ in range(20):
        with database.write() as session:
            dataset = make_dataset(session, make_tenant(session), "uploaded")
            plan = datasets.claim(session, "v", LEASE)
            assert plan is not None
        job_id, known = race(partial(submit, dataset), partial(validate, plan))
        with database.read() as session:
            assert (known, session.get_one(Job, job_id).status) == (True, "queued")


def test_a_file_that_is_deleted_while_a_job_is_made_is_kept_or_refused(database: Database, catalog: Catalog) -> None:
    def submit(dataset: Dataset) -> bool:
        with database.write() as session:
            base = catalog.all()[0]
            try:
                jobs.create_job(session, dataset.tenant_id, base, dataset_id=dataset.id, hyperparameters={})
            except NotFound:
                return False
            time.sleep(0.002)
            return True

    def delete(dataset: Dataset) -> bool:
        with database.write() as session:
            try:
                datasets.delete_dataset(session, dataset.tenant_id, dataset.id)
            except Conflict:
                return False
            return True

    for _ in range(20):
        with database.write() as session:
            dataset = make_dataset(session, make_tenant(session))
        made, deleted = race(partial(submit, dataset), partial(delete, dataset))
        assert made != deleted


def test_the_quota_holds_when_requests_come_at_once(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant)

    def submit() -> bool:
        try:
            with database.write() as session:
                make_job(session, tenant, catalog, dataset, max_queued=3)
        except OverQuota:
            return False
        return True

    assert sum(race(*[submit] * 8)) == 3
