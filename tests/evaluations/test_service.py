"""What a worker and upkeep do with an evaluation that another release wrote."""

from datetime import timedelta

from sqlalchemy import update

from core.bases import Catalog
from core.db.session import Database, now
from core.evaluations import service as evaluations
from core.evaluations.spec import EvaluationSpec
from core.models import Evaluation
from tests.rows import LEASE, base_of, make_dataset, make_tenant

SPEC = EvaluationSpec("all", 0, 16, 8, 3, "ddim", "none", 1.0, 0, False)


def ask(database: Database, catalog: Catalog, **of_another_release: int) -> str:
    with database.write() as session:
        tenant = make_tenant(session)
        dataset = make_dataset(session, tenant)
        row = evaluations.create_evaluation(session, tenant.id, base_of(catalog), None, dataset, SPEC)
        row.request = {**row.request, **of_another_release}
        return row.id


def found(database: Database, evaluation_id: str) -> Evaluation:
    with database.read() as session:
        return session.get_one(Evaluation, evaluation_id)


def claim(database: Database, catalog: Catalog) -> str | None:
    with database.write() as session:
        plan = evaluations.claim(session, "w", LEASE, catalog)
    return plan and plan.evaluation_id


def test_what_another_release_wrote_stays_queued_and_the_next_one_is_claimed(
    database: Database, catalog: Catalog
) -> None:
    newer, plain = ask(database, catalog, of_a_newer_release=1), ask(database, catalog)
    assert claim(database, catalog) == plain
    assert claim(database, catalog) is None
    row = found(database, newer)
    assert (row.status, row.attempt, row.crashes, row.error) == ("queued", 0, 0, None)
    with database.read() as session:
        assert not evaluations.is_waiting(session, catalog)


def test_an_older_upkeep_takes_back_what_a_newer_worker_lost(database: Database, catalog: Catalog) -> None:
    lost = [ask(database, catalog), ask(database, catalog)]
    assert {claim(database, catalog) for _ in lost} == set(lost)
    with database.write() as session:
        row = session.get_one(Evaluation, lost[0])
        row.request = {**row.request, "of_a_newer_release": 1}
        session.execute(update(Evaluation).values(lease_until=now(session) - timedelta(seconds=1)))
    with database.write() as session:
        assert evaluations.sweep(session, 3)
    rows = [found(database, evaluation_id) for evaluation_id in lost]
    assert [(row.status, row.crashes) for row in rows] == [("queued", 1)] * 2
