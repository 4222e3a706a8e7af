"""A tenant that is suspended or deleted: its work ends, its bytes go, and nobody else notices."""

import itertools
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from core import retention
from core.bases import Catalog
from core.db.session import Database
from core.errors import Conflict, NotFound
from core.evaluations import service as evaluations
from core.evaluations.spec import EvaluationSpec
from core.jobs import attempts
from core.jobs.claims import Plan
from core.models import Adapter, Dataset, Evaluation, Job, Sample, Tenant
from core.samples import service as samples
from core.storage import keys
from core.storage.local import LocalStore
from core.tenants import leaving
from core.tenants import service as tenants
from tests.races import race
from tests.rows import (
    adapter_for,
    base_of,
    claim_job,
    make_checkpoint,
    make_dataset,
    make_job,
    make_sample,
    make_tenant,
    report_step,
)

Addition = Callable[[Session, Tenant, Catalog, Dataset], object]


def _evaluate(session: Session, tenant: Tenant, catalog: Catalog, dataset: Dataset) -> Evaluation:
    spec = EvaluationSpec("all", 0, 8, 8, 4, "ddim", "none", 1.0, 0, False)
    return evaluations.create_evaluation(session, tenant.id, base_of(catalog), None, dataset, spec)


ADDITIONS: dict[str, Addition] = {
    "upload": lambda session, tenant, _catalog, _dataset: make_dataset(session, tenant, "uploaded"),
    "job": make_job,
    "image": lambda session, tenant, catalog, _dataset: make_sample(session, tenant, catalog),
    "evaluation": _evaluate,
}


def test_its_work_ends_and_others_go_on(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        leaver, other = make_tenant(session), make_tenant(session)
        running = make_job(session, leaver, catalog)
        plan = claim_job(session, catalog)
        waiting = make_job(session, leaver, catalog)
        asked = make_sample(session, leaver, catalog)
        others = (make_job(session, other, catalog), make_sample(session, other, catalog))
        secret = tenants.create_key(session, leaver.id, "k").secret
    leaving.suspend(database, leaver.id)
    with database.write() as session:
        with pytest.raises(tenants.Suspended):
            tenants.authenticate(session, secret)
        assert session.get_one(Job, waiting.id).status == "cancelled"
        assert session.get_one(Sample, asked.id).status == "cancelled"
        assert session.get_one(Job, running.id).cancel_requested, "its worker stops at the next step"
        assert [session.get_one(type(row), row.id).status for row in others] == ["queued", "queued"]
        with pytest.raises(Conflict) as busy:
            leaving.remove(session, session.get_one(Tenant, leaver.id))
        assert busy.value.code == "tenant_busy"
        assert attempts.stop(session, plan, attempts.standing(session, plan))
        leaving.remove(session, session.get_one(Tenant, leaver.id))
    with database.read() as session, pytest.raises(tenants.Unauthenticated):
        tenants.authenticate(session, secret)


def test_all_its_bytes_go_and_no_others(database: Database, catalog: Catalog, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "objects")
    with database.write() as session:
        both = [make_tenant(session), make_tenant(session)]
        named = [_everything(session, tenant, catalog) for tenant in both]
    for key in named[0] + named[1]:
        store.put(key, b"bytes")
    leaving.suspend(database, both[0].id)
    with database.write() as session:
        leaving.remove(session, session.get_one(Tenant, both[0].id))
    assert _kept(database, store) == set(named[1])


def _kept(database: Database, store: LocalStore) -> set[str]:
    """What is there still when orphans are past their grace."""
    hours = itertools.count()
    orphans = retention.Orphans(clock=lambda: retention.GRACE_SECONDS * next(hours))
    for _ in range(2):
        retention.sweep(database, store, orphans, timedelta(hours=1), keep_checkpoints=3)
    return {info.key for info in store.list()}


def _everything(session: Session, tenant: Tenant, catalog: Catalog) -> list[str]:
    """Keys of a dataset, an adapter, a checkpoint and a picture of the tenant's."""
    make_job(session, tenant, catalog, hyperparameters={"steps": 10})
    plan = claim_job(session, catalog)
    checkpoint = keys.checkpoint(tenant.id, plan.job_id, 1, 5)
    assert make_checkpoint(session, plan, 5, checkpoint)
    adapter = adapter_for(plan)
    assert attempts.finish(session, plan, adapter, {})
    adapter.object_key = keys.adapter(tenant.id, adapter.id, adapter.sha256)
    dataset = session.get_one(Dataset, session.get_one(Job, plan.job_id).dataset_id)
    dataset.object_key, dataset.pack_key = keys.archive(tenant.id, dataset.id), keys.pack(tenant.id, dataset.id, 1)
    sample = make_sample(session, tenant, catalog)
    [drawn] = samples.claim(session, "w", 30.0, catalog, 1)
    picture = keys.image(tenant.id, sample.id, 1, 0)
    assert samples.finish(session, drawn, [{"key": picture, "sha256": "0", "bytes": 1, "seed": 0}], {})
    return [checkpoint, adapter.object_key, dataset.object_key, dataset.pack_key, picture]


def test_what_an_accepted_request_draws_with_outlives_its_adapter(
    database: Database, catalog: Catalog, tmp_path: Path
) -> None:
    """A deleted adapter's bytes go once the requests that were under way have ended, not before."""
    store = LocalStore(tmp_path / "objects")
    with database.write() as session:
        tenant = make_tenant(session)
        _everything(session, tenant, catalog)
        adapter = session.query(Adapter).one()
        sample = make_sample(session, tenant, catalog)
        part = {"adapter_id": adapter.id, "model": adapter.model, "weight": 1.0, "label": None}
        sample.request = {**sample.request, "adapters": [part]}
        adapter.deleted_at = adapter.created_at
    store.put(adapter.object_key, b"bytes")
    assert _kept(database, store) == {adapter.object_key}
    with database.write() as session:
        samples.cancel(session, session.get_one(Sample, sample.id))
    assert _kept(database, store) == set()


@pytest.mark.parametrize("addition", ADDITIONS.values(), ids=ADDITIONS.keys())
def test_a_request_that_passed_before_the_suspension_adds_nothing_after_it(
    database: Database, catalog: Catalog, addition: Addition
) -> None:
    """It was let in by its key, and its body or a lock took it longer than the operator."""
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant)
    is_suspended = threading.Event()

    def suspend() -> None:
        with database.write() as session:
            session.get_one(Tenant, tenant.id).status = "suspended"
            session.flush()
            is_suspended.set()
            time.sleep(0.2)  # the addition waits for this commit, and looks then

    def add() -> str:
        is_suspended.wait(30)
        with pytest.raises(tenants.Suspended) as refused, database.write() as session:
            addition(session, tenant, catalog, dataset)
        return refused.value.code

    assert race(suspend, add)[1] == "tenant_suspended"
    with database.write() as session:
        session.get_one(Tenant, tenant.id).status = "active"
        addition(session, tenant, catalog, dataset)


@pytest.mark.parametrize("addition", ADDITIONS.values(), ids=ADDITIONS.keys())
def test_whichever_comes_first_nothing_of_a_deleted_tenant_is_left(
    database: Database, catalog: Catalog, addition: Addition
) -> None:
    def add(tenant: Tenant, dataset: Dataset) -> bool:
        try:
            with database.write() as session:
                addition(session, tenant, catalog, dataset)
                time.sleep(0.002)  # between the look at the tenant and the commit
        except (tenants.Suspended, NotFound):  # its file may be gone first
            return False
        return True

    def leave(tenant: Tenant) -> None:
        leaving.suspend(database, tenant.id)
        with database.write() as session:
            leaving.remove(session, session.get_one(Tenant, tenant.id))

    for _ in range(10):
        with database.write() as session:
            tenant = make_tenant(session)
            dataset = make_dataset(session, tenant)
        race(partial(add, tenant, dataset), partial(leave, tenant))
        with database.read() as session:
            assert session.scalars(select(Dataset).where(Dataset.deleted_at.is_(None))).all() == []
            for table in (Job, Sample, Evaluation):
                assert {row.status for row in session.scalars(select(table))} <= {"cancelled"}


def _during_suspension(database: Database, plan: Plan, write: Callable[[Session], bool]) -> bool:
    """What a worker's `write` returns while it holds its job and the tenant is being suspended."""
    holds_job = threading.Event()

    def work() -> bool:
        with database.write() as session:
            assert attempts.is_held(session, plan)
            holds_job.set()
            time.sleep(0.3)  # the suspension is under way
            return write(session)

    def suspend() -> None:
        holds_job.wait(30)
        leaving.suspend(database, plan.tenant_id)

    return race(work, suspend)[0]


def test_a_worker_that_reports_and_a_suspension_do_not_wait_for_each_other(
    database: Database, catalog: Catalog
) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        make_job(session, tenant, catalog)
        plan = claim_job(session, catalog)
    assert _during_suspension(database, plan, lambda session: report_step(session, plan, 1).held)
    with database.read() as session:
        assert attempts.standing(session, plan).cancel


def test_a_job_that_ends_by_itself_stands_in_no_suspensions_way_nor_leaves_an_evaluation(
    database: Database, catalog: Catalog
) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant)
        dataset.classes = [{"name": "a", "count": 200}, {"name": "b", "count": 200}]
        make_job(session, tenant, catalog, dataset, evaluate=True)
        plan = claim_job(session, catalog)

    def finish(session: Session) -> bool:
        return attempts.finish(session, plan, adapter_for(plan), {})

    assert _during_suspension(database, plan, finish)
    with database.read() as session:
        assert session.get_one(Tenant, tenant.id).status == "suspended"
        assert session.get_one(Job, plan.job_id).status == "succeeded"
        assert [row.status for row in session.scalars(select(Evaluation))] == ["cancelled"]
