"""A worker that hangs is ended, one that is merely slow is not."""

import time

import pytest

from core.jobs import upkeep
from tests.worker.shop import Shop

KILLED = -9


def test_a_worker_that_hangs_ends_and_its_job_goes_on_elsewhere(shop: Shop) -> None:
    undisturbed = shop.job()
    shop.pump()
    job_id = shop.job()
    shop.services.settings.stall_seconds = 20.0  # more than another process takes to start on a busy machine
    assert shop.pump_elsewhere("after_step:7:sleep") == KILLED
    time.sleep(shop.services.settings.lease_seconds)
    with shop.services.database.write() as session:
        assert upkeep.sweep(session, shop.services.settings.max_attempts)
    shop.pump()
    job = shop.get_job(job_id)
    assert (job.status, job.attempt, job.crashes) == ("succeeded", 2, 0)
    assert shop.adapters(job_id)[0].sha256 == shop.adapters(undisturbed)[0].sha256


@pytest.mark.parametrize(("chunk", "is_ended"), [(4, False), (1000, True)])
def test_many_images_take_long_to_be_encoded_and_that_is_no_hang(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, chunk: int, is_ended: bool
) -> None:
    ended: list[float] = []
    moved = shop.runtime.moved

    def slowly() -> None:
        time.sleep(0.6 * min(chunk, 24) / 4)  # 24 images take 3.6 s, in however many chunks
        moved()

    real = shop.runtime.prepared

    def prepared(plan: object) -> object:
        with monkeypatch.context() as within:
            within.setattr(shop.runtime, "moved", slowly)
            return real(plan)  # type: ignore[arg-type]

    monkeypatch.setattr("core.diffusion.base._CODEC_BATCH", chunk)
    monkeypatch.setattr("worker.pump._die", lambda: ended.append(time.monotonic()))
    monkeypatch.setattr(shop.runtime, "prepared", prepared)
    shop.services.settings.stall_seconds = 2.5
    shop.runtime.device("tiny-dit")
    shop.job()
    shop.pump()
    assert bool(ended) == is_ended
