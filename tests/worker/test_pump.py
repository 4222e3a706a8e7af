"""The device worker: what it makes, and what is left of it when it dies at any instant."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select, update

from core.adapters import format as adapter_format
from core.diffusion.base import Base
from core.errors import Invalid
from core.jobs import attempts, claims
from core.models import Checkpoint, Dataset, Job, JobMetric, Preview
from core.settings import Settings
from tests.diffusion.tiny import make_pixart
from tests.worker.conftest import opened_shop
from tests.worker.shop import MODEL, Shop

KILLED = -9


def test_a_job_ends_in_one_adapter_whose_bytes_the_database_names(shop: Shop) -> None:
    job_id = shop.job(preview_every=6)
    shop.pump()
    job = shop.get_job(job_id)
    assert (job.status, job.step, job.attempt) == ("succeeded", 12, 1)
    [adapter] = shop.adapters(job_id)
    data = shop.services.store.get(adapter.object_key)
    assert hashlib.sha256(data).hexdigest() == adapter.sha256
    with shop.services.database.read() as session:
        metrics = session.scalars(select(JobMetric).where(JobMetric.job_id == job_id)).all()
        previews = session.scalars(select(Preview).where(Preview.job_id == job_id).order_by(Preview.step)).all()
    assert [metric.step for metric in metrics] == list(range(1, 13))
    assert [preview.step for preview in previews] == [6, 12]
    strip = Image.open(io.BytesIO(shop.services.store.get(previews[-1].object_key)))
    assert strip.width == strip.height * len(previews[-1].classes)
    assert job.device_seconds > 0


def test_images_are_encoded_once_whatever_the_seeds_of_their_jobs(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    real = Base.encode

    def encode(self: Base, images: np.ndarray, *more: Any) -> Any:
        encoded.append(len(images))
        return real(self, images, *more)

    monkeypatch.setattr(Base, "encode", encode)
    first, second = shop.job(seed=7, steps=4), shop.job(seed=8, steps=4)
    shop.pump()
    assert encoded == [24]
    shop.runtime._prepared.clear()
    again = shop.job(seed=8, steps=4)
    shop.pump()
    assert encoded == [24, 24]
    [one], [two], [three] = (shop.adapters(job_id) for job_id in (first, second, again))
    assert one.sha256 != two.sha256 == three.sha256


def test_losing_the_moments_is_seen_in_the_bytes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of `tests/e2e/test_crash_points.py`: what it relies on would show if it broke."""
    from core.training import checkpoint

    undisturbed = shop.job()
    shop.pump()
    job_id = shop.job()
    assert shop.pump_elsewhere("after_step:7:kill") == KILLED
    shop.lose_leases()
    whole = checkpoint.load

    def without_moments(*args: object, **options: object) -> object:
        state = whole(*args, **options)  # type: ignore[arg-type]
        state.first.zero_()
        return state

    monkeypatch.setattr(checkpoint, "load", without_moments)
    shop.pump()
    assert shop.adapters(job_id)[0].sha256 != shop.adapters(undisturbed)[0].sha256


def test_an_attempt_that_lost_its_job_writes_nothing_more(shop: Shop) -> None:
    job_id = shop.job()
    with shop.services.database.write() as session:
        old = claims.claim(session, "old", 60, shop.services.catalog)
    assert old is not None
    shop.lose_leases()
    shop.pump()
    before = shop.get_job(job_id)
    with shop.services.database.write() as session:
        standing = attempts.report(session, old, step=3, progress={"step": 3}, device_seconds=1)
        assert not standing.held
        assert not attempts.add_checkpoint(session, old, step=3, key="k", sha256="s", size=1, metrics={})
        assert not attempts.fail(session, old, code="late", message="late")
        assert not attempts.yield_back(session, old)
    after = shop.get_job(job_id)
    assert (after.status, after.step, after.updated_at) == (before.status, before.step, before.updated_at)


def test_an_unreadable_checkpoint_gives_way_to_the_one_before(shop: Shop) -> None:
    undisturbed = shop.job()
    shop.pump()
    job_id = shop.job()
    assert shop.pump_elsewhere("after_step:11:kill") == KILLED
    with shop.services.database.read() as session:
        newest = session.scalars(
            select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())
        ).first()
    assert newest is not None
    assert newest.step == 8
    data = bytearray(shop.services.store.get(newest.object_key))
    data[-1] ^= 1
    shop.services.store.put(newest.object_key, bytes(data))
    shop.lose_leases()
    shop.pump()
    assert "Checkpoint of step 8 is unreadable: going back" in shop.messages(job_id)
    assert shop.adapters(job_id)[0].sha256 == shop.adapters(undisturbed)[0].sha256


def test_a_corrupt_dataset_fails_its_job_with_its_code(shop: Shop) -> None:
    job_id = shop.job()
    with shop.services.database.read() as session:
        pack = session.get_one(Dataset, shop.dataset_id).pack_key
    shop.services.store.put(pack or "", b"other bytes")
    shop.pump()
    job = shop.get_job(job_id)
    assert (job.status, (job.error or {})["code"]) == ("failed", "dataset_corrupt")
    assert shop.adapters(job_id) == []


def test_a_dataset_whose_bytes_are_gone_fails_its_job_and_names_no_object(shop: Shop) -> None:
    job_id = shop.job()
    with shop.services.database.read() as session:
        shop.services.store.delete(session.get_one(Dataset, shop.dataset_id).pack_key or "")
    shop.pump()
    error = shop.get_job(job_id).error or {}
    assert (error["code"], error["message"]) == ("dataset_corrupt", "the dataset's bytes are gone")


def test_a_job_for_a_base_that_has_changed_is_not_run_on_the_new_one(shop: Shop) -> None:
    job_id = shop.job()
    with shop.services.database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(base_fingerprint="of another base"))
    shop.pump()
    job = shop.get_job(job_id)
    assert (job.status, (job.error or {})["code"]) == ("failed", "base_changed")


def test_a_job_that_diverges_publishes_nothing(shop: Shop) -> None:
    job_id = shop.job(learning_rate=1.0, steps=200, clip_norm=1e6, warmup_steps=0)
    with shop.services.database.write() as session:
        spec = dict(shop.get_job(job_id).spec or {}) | {"learning_rate": 1e30}
        session.execute(update(Job).where(Job.id == job_id).values(spec=spec))
    shop.pump()
    job = shop.get_job(job_id)
    assert (job.status, (job.error or {})["code"]) == ("failed", "diverged")
    assert shop.adapters(job_id) == []


def test_a_job_that_kills_its_worker_each_time_is_given_up(shop: Shop) -> None:
    job_id = shop.job()
    for _ in range(shop.services.settings.max_attempts):
        assert shop.pump_elsewhere("dataset_loaded:1:kill") == KILLED
        shop.lose_leases()
    job = shop.get_job(job_id)
    assert (job.status, (job.error or {})["code"]) == ("failed", "crashed")


def test_an_image_does_not_depend_on_what_shares_its_batch(shop: Shop) -> None:
    job_id = shop.job()
    shop.pump()
    [adapter] = shop.adapters(job_id)
    alone: list[str] = []
    for adapters, prompt in (((), None), ((adapter.id,), "disc")):
        alone.append(shop.sample(*adapters, prompt=prompt))
        shop.pump()
        found = shop.get_sample(alone[-1])
        assert (found.status, (found.stats or {})["batch_size"]) == ("succeeded", 2 if adapters else 1)
    together = [shop.sample(steps=4), shop.sample(adapter.id, prompt="disc"), shop.sample(steps=9)]
    shop.pump()
    pictures = [_picture(shop, sample_id) for sample_id in (*alone, *together[:2])]
    assert pictures[0] == pictures[2]
    assert pictures[1] == pictures[3]
    stats = shop.get_sample(together[1]).stats or {}
    assert (stats["distinct_adapters"], stats["batch_size"]) == (1, 4)  # the base is not counted; one is guided


def test_an_adapter_that_is_gone_fails_its_own_request_alone(shop: Shop) -> None:
    job_id = shop.job()
    shop.pump()
    [adapter] = shop.adapters(job_id)
    shop.services.store.delete(adapter.object_key)
    lost, fine = shop.sample(adapter.id, prompt="disc"), shop.sample()
    shop.pump()
    assert shop.get_sample(lost).status == "failed"
    error = shop.get_sample(lost).error or {}
    assert (error["code"], error["message"]) == ("object_missing", "its bytes are not in the object store any more")
    assert shop.get_sample(fine).status == "succeeded"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed process needs POSIX signals")
def test_a_request_whose_worker_died_is_drawn_by_the_next(shop: Shop) -> None:
    sample_id = shop.sample()
    assert shop.pump_elsewhere("mid_sample:1:kill") == KILLED
    assert shop.get_sample(sample_id).status == "running"
    shop.lose_leases()
    shop.pump()
    found = shop.get_sample(sample_id)
    assert (found.status, found.attempt) == ("succeeded", 2)


def _picture(shop: Shop, sample_id: str) -> bytes:
    [image] = shop.get_sample(sample_id).images or []
    pixels = Image.open(io.BytesIO(shop.services.store.get(image["key"])))
    return pixels.tobytes()


def test_a_job_above_the_bases_size_trains_draws_and_says_so(shop: Shop) -> None:
    job_id = shop.job(image_size=64, steps=2, preview_every=2, preview_steps=2, gamma_depth=[1, 3])
    shop.pump()
    assert shop.get_job(job_id).status == "succeeded", shop.get_job(job_id).error
    [row] = shop.adapters(job_id)
    assert row.image_size == 64
    assert row.layout == {"kind": "difffit", "gamma_depth": [1, 3], "gamma_places": ["attention", "mlp"]}
    adapter = adapter_format.load(shop.services.store.get(row.object_key))
    assert adapter.meta["image_size"] == 64
    assert adapter.layout.options.gamma_depth == (1, 3)
    with shop.services.database.read() as session:
        preview = session.scalars(select(Preview).where(Preview.job_id == job_id)).one()
    assert Image.open(io.BytesIO(shop.services.store.get(preview.object_key))).height == 64
    for asked, side in ((None, 64), ("64x64", 64), ("32x32", 32)):
        sample = shop.get_sample(shop.sample(row.id, prompt=row.classes[0], size=asked))
        shop.pump()
        sample = shop.get_sample(sample.id)
        assert sample.status == "succeeded", sample.error
        assert sample.images is not None
        assert Image.open(io.BytesIO(shop.services.store.get(sample.images[0]["key"]))).size == (side, side)
    with pytest.raises(Invalid, match="only 64x64, 32x32"):
        shop.sample(row.id, prompt=row.classes[0], size="48x48")
    with pytest.raises(Invalid, match="only 32x32"):
        shop.sample(size="64x64")


def test_a_text_to_image_base_is_adapted_and_drawn_from_by_the_same_worker(
    shop_settings: Settings, tmp_path: Path
) -> None:
    folder = make_pixart(tmp_path / MODEL)
    with opened_shop(shop_settings.model_copy(update={"bases": [str(folder)]})) as shop:
        job_id = shop.job(steps=3, preview_every=3, preview_steps=2)
        shop.pump()
        assert shop.get_job(job_id).status == "succeeded", shop.get_job(job_id).error
        [row] = shop.adapters(job_id)
        adapter = adapter_format.load(shop.services.store.get(row.object_key))
        assert adapter.class_delta.shape == (len(row.classes) + 1, 0)
        assert row.parameters == len(adapter.theta)
        pictures = []
        for prompt in row.classes[:2]:
            sample = shop.get_sample(shop.sample(row.id, prompt=prompt))
            shop.pump()
            sample = shop.get_sample(sample.id)
            assert sample.status == "succeeded", sample.error
            assert sample.images is not None
            pictures.append(shop.services.store.get(sample.images[0]["key"]))
        assert pictures[0] != pictures[1]  # one seed, two prompts
        with pytest.raises(Invalid, match="through its adapters"):
            shop.sample(prompt="disc")
