"""A job on two devices in the worker: real processes that take part, die, hang, and are replaced."""

import os
import signal
import time
from pathlib import Path

import pytest

from core.settings import Settings
from tests.conftest import make_settings
from tests.processes import is_running
from tests.worker.shop import Shop
from worker.cotraining import CoTraining

KILLED = -9


@pytest.fixture
def shop_settings(tmp_path: Path, tiny_base: Path) -> Settings:
    return make_settings(
        tmp_path / "data", bases=[str(tiny_base)], lease_seconds=60, slice_seconds=600, threads=1, max_devices=2
    )


def ranks_running(data_dir: Path) -> int:
    """Processes that take part in a job of the worker whose data folder that is, also when it is gone."""
    told = f"DIFFFIT_DATA_DIR={data_dir}".encode()
    return sum(
        b"core.training.rank" in _read(process / "cmdline") and told in _read(process / "environ").split(b"\0")
        for process in Path("/proc").glob("[0-9]*")
    )


def _read(path: Path) -> bytes:
    """Nothing, of a process that has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_job_whose_process_dies_ends_in_the_same_bytes(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAULT", "rank_step:9:kill")
    disturbed = shop.job(devices=2)
    shop.pump()
    job = shop.get_job(disturbed)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert job.numeric_path is not None
    assert (job.numeric_path["world"], job.numeric_path["micro_batch"]) == (2, 2)
    lost = "Attempt 1 ended (process 1 of this job ended: it said nothing); going on from the last checkpoint"
    assert lost in shop.messages(disturbed)
    idle = shop.runtime._crew
    assert idle is not None
    os.kill(idle.pids[0], signal.SIGKILL)  # it waited for the next job, which finds another
    while idle.is_alive:
        time.sleep(0.01)
    monkeypatch.delenv("FAULT")
    undisturbed, again, alone = shop.job(devices=2), shop.job(devices=2), shop.job()
    shop.pump()
    assert [shop.get_job(job_id).attempt for job_id in (undisturbed, again)] == [1, 1]
    kept = shop.runtime._crew
    assert kept is not None
    assert kept is not idle
    [one], [two], [three], [four] = (shop.adapters(job_id) for job_id in (disturbed, undisturbed, again, alone))
    assert one.sha256 == two.sha256 == three.sha256
    assert four.sha256 != two.sha256
    shop.runtime.close()
    assert not any(is_running(pid) for pid in (*kept.pids, *idle.pids))


def test_a_job_whose_worker_dies_ends_in_the_same_bytes_and_no_process_is_left(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DIFFFIT_MAX_DEVICES", "2")
    killed = shop.job(devices=2)
    data_dir = shop.services.settings.data_dir
    assert shop.pump_elsewhere("after_step:7:kill") == KILLED
    assert shop.get_job(killed).step == 6  # as it was last reported
    assert ranks_running(data_dir) == 0
    shop.lose_leases()
    undisturbed = shop.job(devices=2)
    shop.pump()
    assert shop.adapters(killed)[0].sha256 == shop.adapters(undisturbed)[0].sha256
    assert shop.get_job(killed).attempt == 2


def test_a_process_that_hangs_costs_an_attempt_and_no_more(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAULT", "rank_step:9:stop")
    job_id = shop.job(devices=2)
    monkeypatch.setattr(shop.services.settings, "stall_seconds", 30.0)
    shop.pump()
    job = shop.get_job(job_id)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert any("does not answer" in message for message in shop.messages(job_id))


def test_a_job_on_two_devices_shares_its_passes_with_nobody(shop: Shop):
    first, second, third = shop.job(), shop.job(devices=2), shop.job()
    training = CoTraining(shop.runtime)
    claimed = [training.claim()]
    training.advance()  # prepared: others may join
    claimed += [training.claim(), training.claim()]
    assert claimed == [True, True, False]
    assert [shop.get_job(job_id).status for job_id in (first, second, third)] == ["running", "queued", "running"]
    training.hand_back()
    shop.pump()
    assert {shop.get_job(job_id).status for job_id in (first, second, third)} == {"succeeded"}


def test_a_worker_with_one_device_leaves_a_job_on_two_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shop.runtime, "max_devices", 1)
    two, one = shop.job(devices=2), shop.job()
    shop.pump()
    assert (shop.get_job(two).status, shop.get_job(one).status) == ("queued", "succeeded")
