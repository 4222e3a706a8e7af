"""Jobs that begin where an adapter or a checkpoint ended, in the worker."""

import pytest
import torch
from sqlalchemy import select

from core.adapters import format as adapter_format
from core.diffusion.adapter import Adapter
from core.jobs import service as jobs
from core.jobs.start import Start, from_adapter, from_checkpoint
from core.models import Checkpoint
from core.training import checkpoint
from tests.worker.shop import MODEL, Shop, add_dataset

KILLED = -9


def continuing(shop: Shop, start: Start, dataset_id: str | None = None, **hyperparameters: object) -> str:
    with shop.services.database.write() as session:
        return jobs.create_job(
            session,
            shop.tenant_id,
            shop.services.catalog.get(MODEL),
            dataset_id=dataset_id or shop.dataset_id,
            hyperparameters={"steps": 6, "batch_size": 4, "preview_every": None, **hyperparameters},
            seed=7,
            start=start,
        ).id


def made(shop: Shop, job_id: str) -> Adapter:
    [row] = shop.adapters(job_id)
    return adapter_format.load(shop.services.store.get(row.object_key))


def trained(shop: Shop) -> Start:
    """An adapter that has moved visibly."""
    job_id = shop.job(steps=30, learning_rate=0.02)
    shop.pump()
    return from_adapter(shop.adapters(job_id)[0])


def test_a_job_goes_on_from_its_tenants_adapter(shop: Shop) -> None:
    start = trained(shop)
    source = adapter_format.load(shop.services.store.get(start.key))
    job_id = continuing(shop, start, steps=1, learning_rate=1e-8)
    shop.pump()
    after = made(shop, job_id)
    torch.testing.assert_close(after.theta, source.theta, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.class_delta, source.class_delta, rtol=0, atol=1e-6)
    assert source.theta.abs().max() > 1e-3
    assert f"Continuing from adapter {start.id}" in shop.messages(job_id)


def test_classes_that_both_have_go_on_and_new_ones_start_anew(shop: Shop) -> None:
    start = trained(shop)
    source = adapter_format.load(shop.services.store.get(start.key))
    other = add_dataset(shop.services, shop.tenant_id, names=("bar", "ring"))
    job_id = continuing(shop, start, dataset_id=other, steps=1, learning_rate=1e-8)
    shop.pump()
    after = made(shop, job_id)
    assert (source.classes, after.classes) == (("bar", "disc"), ("bar", "ring"))
    torch.testing.assert_close(after.class_delta[0], source.class_delta[0], rtol=0, atol=1e-6)
    assert after.class_delta[1].abs().max() < 1e-6
    torch.testing.assert_close(after.class_delta[2], source.class_delta[2], rtol=0, atol=1e-6)  # the null row
    assert (source.class_delta.abs().amax(1) > 1e-3).all()


def test_a_job_goes_on_from_a_checkpoint(shop: Shop) -> None:
    shop.job(steps=12)
    shop.pump()
    with shop.services.database.read() as session:
        found = session.scalars(select(Checkpoint).where(Checkpoint.step == 8)).one()
        start = from_checkpoint(session, shop.tenant_id, found.id)
    source = checkpoint.read(shop.services.store.get(start.key))
    job_id = continuing(shop, start, steps=1, learning_rate=1e-8)
    shop.pump()
    after = made(shop, job_id)
    torch.testing.assert_close(torch.cat([after.theta, after.class_delta.flatten()]), source.average, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fault", ["after_step:2", "after_step:5"])
def test_a_continued_job_that_is_killed_ends_in_the_same_bytes(shop: Shop, fault: str) -> None:
    start = trained(shop)
    undisturbed = continuing(shop, start, checkpoint_every=3)
    shop.pump()
    job_id = continuing(shop, start, checkpoint_every=3)
    assert shop.pump_elsewhere(f"{fault}:kill") == KILLED
    shop.lose_leases()
    shop.pump()
    assert shop.adapters(job_id)[0].sha256 == shop.adapters(undisturbed)[0].sha256
    fresh = shop.job(steps=6, checkpoint_every=3)
    shop.pump()
    assert shop.adapters(job_id)[0].sha256 != shop.adapters(fresh)[0].sha256


@pytest.mark.parametrize("what", ["gone", "other"])
def test_a_job_whose_start_cannot_be_read_says_so(shop: Shop, what: str) -> None:
    start = trained(shop)
    job_id = continuing(shop, start)
    if what == "gone":
        shop.services.store.delete(start.key)
    else:
        shop.services.store.put(start.key, b"other bytes")
    shop.pump()
    job = shop.get_job(job_id)
    assert (job.status, (job.error or {})["code"]) == ("failed", "start_unreadable")
