"""Evaluations by the device worker: what is measured, and what is left when it dies or is told to stop."""

from typing import Any

import pytest
from sqlalchemy import select

from core.errors import Invalid
from core.evaluations import service as evaluations
from core.evaluations.spec import resolve
from core.models import Adapter, Dataset, Evaluation, Job, Tenant
from core.samples.spec import SampleSpec
from tests.worker.shop import MODEL, Shop, add_dataset

KILLED = -9


def ask(shop: Shop, adapter_id: str | None = None, images: int = 16, **drawn: object) -> str:
    with shop.services.database.write() as session:
        adapter = session.get(Adapter, adapter_id) if adapter_id else None
        job = session.get(Job, adapter.job_id) if adapter and adapter.job_id else None
        dataset = session.get_one(Dataset, shop.dataset_id)
        spec = SampleSpec.default(seed=5, size=adapter.image_size if adapter else 32)
        asked = resolve(dataset, adapter, job, spec, images=images, baseline=None)
        asked = type(asked)(**{**asked.to_json(), "steps": 3, **drawn})
        base = shop.services.catalog.get(MODEL)
        return evaluations.create_evaluation(session, shop.tenant_id, base, adapter, dataset, asked).id


def found(shop: Shop, evaluation_id: str) -> Evaluation:
    with shop.services.database.read() as session:
        return session.get_one(Evaluation, evaluation_id)


def lose(shop: Shop) -> None:
    shop.lose_leases()
    with shop.services.database.write() as session:
        evaluations.sweep(session, shop.services.settings.max_attempts)


def test_a_base_is_measured_against_a_whole_file_and_charged_for(shop: Shop) -> None:
    evaluation_id = ask(shop)
    shop.pump()
    row = found(shop, evaluation_id)
    assert row.status == "succeeded", row.error
    assert row.result is not None
    after = row.result["after"]
    assert after["counts"] == {"generated": 16, "held_out": 24, "training": 0}
    assert after["kernel_distance"]["value"] > 3 * after["kernel_distance"]["error"] > 0
    assert (row.result["before"], row.result["moved"], row.drawn) == (None, None, 16)
    with shop.services.database.read() as session:
        assert session.get_one(Tenant, shop.tenant_id).device_seconds > 0


def test_a_job_that_asks_for_it_is_measured_before_and_after_on_what_it_held_out(shop: Shop) -> None:
    shop.dataset_id = add_dataset(shop.services, shop.tenant_id, each=40)
    job_id = shop.job(evaluate=True)
    shop.pump()
    with shop.services.database.read() as session:
        [row] = session.scalars(select(Evaluation))
        adapter = session.scalars(select(Adapter).where(Adapter.job_id == job_id)).one()
    assert row.status == "succeeded", row.error
    assert row.result is not None
    assert row.request["part"] == "held_out"
    assert row.result["after"]["counts"] == {"generated": 200, "held_out": 8, "training": 72}
    before, after = (row.result[key]["kernel_distance"]["value"] for key in ("before", "after"))
    assert before != after
    assert row.result["moved"] == pytest.approx(1 - after / before, abs=1e-3)
    shown = adapter.metrics["evaluation"]
    assert (shown["id"], shown["kernel_distance"]["value"]) == (row.id, after)
    assert f"Evaluation queued: {row.id}" in shop.messages(job_id)


def test_a_job_whose_file_is_too_small_says_so_and_succeeds(shop: Shop) -> None:
    job_id = shop.job(evaluate=True)
    shop.pump()
    assert shop.get_job(job_id).status == "succeeded"
    [message] = [text for text in shop.messages(job_id) if text.startswith("Not evaluated")]
    assert "2 images held out of training: at least 8" in message


def test_an_evaluation_killed_midway_ends_in_the_same_figures(shop: Shop) -> None:
    reference, disturbed = ask(shop), ask(shop)
    with shop.services.database.write() as session:  # only one of the two may run at first
        session.get_one(Evaluation, disturbed).status = "held"
    shop.pump()
    with shop.services.database.write() as session:
        session.get_one(Evaluation, disturbed).status = "queued"
    assert shop.pump_elsewhere("evaluation_chunk:1:kill") == KILLED
    lose(shop)
    shop.pump()
    row = found(shop, disturbed)
    assert (row.status, row.attempt, row.crashes) == ("succeeded", 2, 1)
    # Other batches, other last bits: a pixel here and there may be another by one.
    assert figures(row.result) == pytest.approx(figures(found(shop, reference).result), rel=1e-3)


def figures(result: Any, path: str = "") -> dict[str, float]:
    """Every number in it, by where it stands."""
    if not isinstance(result, dict):
        return {path: result} if isinstance(result, int | float) else {}
    return {name: value for key, inner in result.items() for name, value in figures(inner, f"{path}/{key}").items()}


def test_a_slice_that_ends_keeps_what_is_drawn(shop: Shop) -> None:
    reference = ask(shop)
    shop.pump()
    evaluation_id = ask(shop)
    shop.services.settings.slice_seconds = 0.1
    while found(shop, evaluation_id).status != "succeeded":
        shop.pump()
        assert found(shop, evaluation_id).attempt < 60
    row = found(shop, evaluation_id)
    assert row.attempt > 1, "it took more than one slice"
    # A picture's last bit may depend on what shared its pass.
    assert figures(row.result) == pytest.approx(figures(found(shop, reference).result), rel=1e-3)
    assert row.crashes == 0


def test_long_jobs_that_always_wait_do_not_starve_an_evaluation(shop: Shop) -> None:
    """Each message has a pump of its own, which ends with its slice."""
    shop.services.settings.slice_seconds = 0.02
    shop.services.settings.max_train_jobs = 1
    jobs = [shop.job(steps=2000), shop.job(steps=2000, seed=2)]
    evaluation_id = ask(shop)
    for _ in range(40):
        shop.pump()
        if found(shop, evaluation_id).status == "succeeded":
            break
    assert found(shop, evaluation_id).status == "succeeded"
    assert {shop.get_job(job_id).status for job_id in jobs} == {"queued"}


def test_a_cancelled_one_leaves_no_object_behind(shop: Shop) -> None:
    shop.services.settings.slice_seconds = 0.1
    evaluation_id = ask(shop)
    while found(shop, evaluation_id).partial_key is None:
        shop.pump()
    with shop.services.database.write() as session:
        assert evaluations.cancel_evaluation(session, shop.tenant_id, evaluation_id).status == "cancelled"
    assert found(shop, evaluation_id).partial_key is None


def test_a_cancelled_one_stops_and_its_worker_writes_nothing_more(shop: Shop) -> None:
    evaluation_id = ask(shop)
    with shop.services.database.write() as session:
        plan = evaluations.claim(session, "w", 60, shop.services.catalog)
        assert plan is not None
        evaluations.cancel_evaluation(session, shop.tenant_id, evaluation_id)
        assert evaluations.report(session, plan, 3) is False
        assert evaluations.finish(session, plan, {}) is False
    row = found(shop, evaluation_id)
    assert (row.status, row.result) == ("cancelled", None)
    shop.pump()
    assert found(shop, evaluation_id).drawn == 3


def test_one_that_kills_its_workers_comes_to_an_end(shop: Shop) -> None:
    evaluation_id = ask(shop)
    for _ in range(shop.services.settings.max_attempts):
        with shop.services.database.write() as session:
            assert evaluations.claim(session, "w", 60, shop.services.catalog)
        with shop.services.database.write() as session:
            session.get_one(Evaluation, evaluation_id).lease_until = session.get_one(
                Evaluation, evaluation_id
            ).created_at
        lose(shop)
    row = found(shop, evaluation_id)
    assert (row.status, (row.error or {})["code"]) == ("failed", "crashed")


def test_one_that_was_cancelled_before_its_last_crash_is_cancelled(shop: Shop) -> None:
    evaluation_id = ask(shop)
    with shop.services.database.write() as session:
        plan = evaluations.claim(session, "w", 60, shop.services.catalog)
        assert plan is not None
        evaluations.cancel_evaluation(session, shop.tenant_id, evaluation_id)
        assert evaluations.put_back(session, plan, "it crashed", max_crashes=1)
    row = found(shop, evaluation_id)
    assert (row.status, row.error) == ("cancelled", None)


def test_one_whose_adapter_is_gone_says_so_and_names_no_object(shop: Shop) -> None:
    shop.dataset_id = add_dataset(shop.services, shop.tenant_id, each=40)
    job_id = shop.job()
    shop.pump()
    [adapter] = shop.adapters(job_id)
    shop.services.store.delete(adapter.object_key)
    evaluation_id = ask(shop, adapter.id)
    shop.pump()
    row = found(shop, evaluation_id)
    error = row.error or {}
    assert (row.status, error["code"]) == ("failed", "object_missing")
    assert error["message"] == "its bytes are not in the object store any more"


def test_a_file_with_too_few_images_is_refused(shop: Shop) -> None:
    with shop.services.database.read() as session:
        dataset = session.get_one(Dataset, shop.dataset_id)
    dataset.classes = [{"name": "a", "count": 7}]
    with pytest.raises(Invalid, match="at least 8 are needed"):
        resolve(dataset, None, None, SampleSpec.default(0, 32), images=None, baseline=None)
