"""Jobs that continue from what their tenant has: what they may ask for, and what is kept for them."""

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from core import retention
from core.bases import Catalog
from core.db.session import Database
from core.errors import Conflict, DomainError, Invalid, NotFound
from core.jobs import attempts
from core.jobs import service as jobs
from core.jobs.start import Start, from_adapter, from_checkpoint
from core.models import Adapter, Checkpoint, Tenant
from core.storage import keys
from core.storage.local import LocalStore
from tests.rows import adapter_for, base_of, claim_job, make_checkpoint, make_job, make_tenant


def trained(session: Session, catalog: Catalog, tenant: Tenant, **hyperparameters: Any) -> Adapter:
    """A job's adapter, with a checkpoint before it."""
    make_job(session, tenant, catalog, hyperparameters={"steps": 10, **hyperparameters})
    plan = claim_job(session, catalog)
    assert make_checkpoint(session, plan, 5, "at-five")
    adapter = adapter_for(plan)
    adapter.base_fingerprint = base_of(catalog).fingerprint
    assert attempts.finish(session, plan, adapter, {})
    return adapter


def starts(session: Session, adapter: Adapter) -> list[Start]:
    checkpoint = session.scalars(select(Checkpoint).where(Checkpoint.job_id == adapter.job_id)).one()
    return [from_adapter(adapter), from_checkpoint(session, adapter.tenant_id, checkpoint.id)]


def test_a_job_takes_over_layout_and_size_unless_told_otherwise(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        adapter = trained(session, catalog, tenant)
        adapter.layout = {"kind": "bitfit", "gamma_depth": "none", "gamma_places": []}
        adapter.image_size = 16
        job = make_job(session, tenant, catalog, hyperparameters={"gamma_depth": "auto"}, start=from_adapter(adapter))
        plan = claim_job(session, catalog)
    assert plan.job_id == job.id
    assert (plan.spec.layout, plan.spec.gamma_places, plan.spec.image_size) == ("bitfit", (), 16)
    assert plan.start == from_adapter(adapter)


@pytest.mark.parametrize("which", [0, 1], ids=["adapter", "checkpoint"])
@pytest.mark.parametrize(("field", "value"), [("layout", "bitfit"), ("gamma_depth", "all"), ("gamma_places", ["mlp"])])
def test_another_layout_is_refused_by_its_field(
    database: Database, catalog: Catalog, which: int, field: str, value: Any
) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        start = starts(session, trained(session, catalog, tenant))[which]
        with pytest.raises(Invalid, match="the same") as caught:
            make_job(session, tenant, catalog, hyperparameters={field: value}, start=start)
    assert (caught.value.code, caught.value.pointer) == ("wrong_layout", f"/method/difffit/hyperparameters/{field}")


@pytest.mark.parametrize("which", [0, 1], ids=["adapter", "checkpoint"])
@pytest.mark.parametrize(
    ("changed", "family", "code"),
    [({"base": "another"}, Invalid, "wrong_base"), ({"base_fingerprint": "0"}, Conflict, "base_changed")],
)
def test_another_base_is_refused_by_the_field_that_named_it(
    database: Database, catalog: Catalog, which: int, changed: dict[str, str], family: type[DomainError], code: str
) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        start = starts(session, trained(session, catalog, tenant))[which]
        other = Start.from_json({**start.to_json(), **changed})
        with pytest.raises(family) as caught:
            make_job(session, tenant, catalog, start=other)
    assert (caught.value.code, caught.value.pointer) == (code, ("/model", "/checkpoint")[which])


def test_another_tenants_checkpoint_does_not_exist(database: Database, catalog: Catalog) -> None:
    with database.write() as session:
        start = starts(session, trained(session, catalog, make_tenant(session)))[1]
        with pytest.raises(NotFound):
            from_checkpoint(session, make_tenant(session).id, start.id)


def test_what_an_unfinished_job_continues_from_is_kept(database: Database, catalog: Catalog, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "objects")
    with database.write() as session:
        tenant = make_tenant(session)
        adapter = trained(session, catalog, tenant)
        adapter.object_key = keys.adapter(tenant.id, adapter.id, adapter.sha256)
        checkpoint = session.scalars(select(Checkpoint)).one()
        checkpoint.object_key = keys.checkpoint(tenant.id, checkpoint.job_id, 1, 5)
        both = {adapter.object_key, checkpoint.object_key}
        continuing = [make_job(session, tenant, catalog, start=start).id for start in starts(session, adapter)]
        adapter.deleted_at = adapter.created_at
    for key in (*both, "photos/family.jpg"):
        store.put(key, b"bytes")
    hours = itertools.count()
    orphans = retention.Orphans(clock=lambda: 3600.0 * next(hours))

    def kept() -> set[str]:
        for _ in range(2):  # before and after the grace that orphans have
            retention.sweep(database, store, orphans, timedelta(hours=1), keep_checkpoints=0)
        return {info.key for info in store.list()}

    assert kept() == {*both, "photos/family.jpg"}
    with database.write() as session:
        for job_id in continuing:
            jobs.cancel_job(session, tenant.id, job_id)
    assert kept() == {"photos/family.jpg"}, "what the service did not store is not its to remove"
