"""What a claim does with a job that was created before its dataset was known."""

from sqlalchemy import update

from core.bases import Catalog
from core.datasets import service as datasets
from core.db.session import Database
from core.jobs import attempts
from core.models import Job, Tenant
from tests.rows import LEASE, make_dataset, make_job, make_tenant, settle


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


def claim(database: Database, catalog: Catalog, max_steps: int) -> attempts.Plan | None:
    with database.write() as session:
        return attempts.claim(session, "w", LEASE, catalog, max_steps=max_steps)


def job_of(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return session.get_one(Job, job_id)


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
