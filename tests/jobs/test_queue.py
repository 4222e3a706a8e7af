"""Whose turn it is."""

from sqlalchemy import select

from core.bases import Catalog
from core.db.session import Database
from core.jobs import attempts
from core.jobs.queue import positions
from core.models import Tenant
from tests.rows import (
    claim_job,
    make_job,
    make_tenant,
    report_step,
)


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
