"""Memory that runs out: before the first step, later on, and for good; the neighbours do not notice."""

from typing import Any

import pytest
import torch

from core.jobs import service as jobs
from core.training.trainee import Trainee
from tests.worker.shop import MODEL, Shop
from worker.cotraining import CoTraining

KILLED = -9
JOB = {"steps": 12, "batch_size": 8, "checkpoint_every": 4}


@pytest.fixture
def limit(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Training passes of more rows raise what torch raises when memory is full."""
    allowed = [10_000]
    base = shop.runtime.training_base(MODEL, None)
    real = base.forward

    def forward(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and len(x) > allowed[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")
        return real(x, *args, **options)

    monkeypatch.setattr(base, "forward", forward)
    return allowed


def sha(shop: Shop, job_id: str) -> str:
    [adapter] = shop.adapters(job_id)
    return adapter.sha256


def micro_batch(shop: Shop, job_id: str) -> int:
    return (shop.get_job(job_id).numeric_path or {})["micro_batch"]


def test_a_batch_that_fits_is_not_cut(shop: Shop) -> None:
    job_id = shop.job(**JOB)
    shop.pump()
    assert micro_batch(shop, job_id) == 8
    assert not any("micro" in message for message in shop.messages(job_id))


def test_micro_batches_are_found_before_the_first_step_and_kept(shop: Shop, limit: list[int]) -> None:
    limit[0] = 3
    job_id = shop.job(**JOB)
    shop.pump()
    assert micro_batch(shop, job_id) == 2
    assert "A batch of 8 does not fit into memory: training in micro-batches of 2" in shop.messages(job_id)
    limit[0] = 10_000
    again = shop.job(**JOB)
    shop.pump()
    assert micro_batch(shop, again) == 8


def test_memory_that_runs_out_later_halves_from_the_last_checkpoint(
    shop: Shop, limit: list[int], at_step: dict[tuple[int, int], Any]
) -> None:
    at_step[7, 6] = lambda: limit.__setitem__(0, 4)
    job_id = shop.job(**JOB)
    shop.pump()
    job = shop.get_job(job_id)
    assert (job.status, job.attempt, job.crashes, micro_batch(shop, job_id)) == ("succeeded", 1, 0, 4)
    assert "Memory ran out: going on from step 4 in micro-batches of 4" in shop.messages(job_id)


def test_a_job_cut_midway_and_killed_ends_in_the_same_bytes(
    shop: Shop, limit: list[int], at_step: dict[tuple[int, int], Any]
) -> None:
    at_step[7, 6] = lambda: limit.__setitem__(0, 4)
    undisturbed = shop.job(**JOB)
    shop.pump()
    limit[0] = 10_000
    at_step[7, 6] = lambda: limit.__setitem__(0, 4)
    job_id = shop.job(**JOB)

    def die() -> None:
        raise SystemExit("the worker is gone")

    at_step[7, 10] = die
    with pytest.raises(SystemExit):
        shop.pump()
    limit[0] = 10_000
    shop.lose_leases()
    shop.pump()
    assert shop.get_job(job_id).attempt == 2
    assert sha(shop, job_id) == sha(shop, undisturbed)


def test_a_job_for_which_no_row_has_room_fails_and_its_neighbour_runs_on(
    shop: Shop, limit: list[int], at_step: dict[tuple[int, int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"steps": 12, "batch_size": 4}
    alone = shop.job(**small)
    shop.pump()
    real = Trainee.draw

    def draw(trainee: Trainee) -> Any:
        if trainee.spec.seed == 3 and trainee.state.step >= 5:
            raise MemoryError
        return real(trainee)

    monkeypatch.setattr(Trainee, "draw", draw)
    mine, greedy = shop.job(**small), shop.rival().job(**JOB, seed=3)
    shop.pump()
    job = shop.get_job(greedy)
    assert (job.status, (job.error or {})["code"]) == ("failed", "out_of_memory")
    halvings = [message for message in shop.messages(greedy) if message.startswith("Memory ran out")]
    assert [message.rsplit(" ", 1)[1] for message in halvings] == ["4", "2", "1", "1"]
    assert shop.adapters(greedy) == []
    assert sha(shop, mine) == sha(shop, alone)


@pytest.fixture
def preparations(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which of the next preparations have the memory that they need, `False` for all that follow if it is the last."""
    has_room: list[bool] = [True]
    real = shop.runtime.prepared

    def prepared(plan: Any) -> Any:
        if not (has_room.pop(0) if len(has_room) > 1 else has_room[0]):
            raise MemoryError
        return real(plan)

    monkeypatch.setattr(shop.runtime, "prepared", prepared)
    return has_room


def test_a_job_that_finds_no_memory_to_be_prepared_in_comes_to_an_end(shop: Shop, preparations: list[bool]) -> None:
    job_id = shop.job(**JOB)
    assert shop.pump_elsewhere("after_step:6:kill") == KILLED
    shop.lose_leases()
    preparations[:] = [False]
    shop.pump()
    job = shop.get_job(job_id)
    assert (job.status, (job.error or {})["code"]) == ("failed", "out_of_memory")
    assert job.attempt <= shop.services.settings.max_attempts
    assert len(shop.messages(job_id)) < 30


def test_memory_that_was_short_for_a_moment_costs_neither_checkpoint_nor_bits(
    shop: Shop, limit: list[int], at_step: dict[tuple[int, int], Any], preparations: list[bool]
) -> None:
    limit[0] = 3
    undisturbed = shop.job(**JOB)
    shop.pump()
    job_id = shop.job(**JOB)

    def die() -> None:
        raise SystemExit("the worker is gone")

    at_step[7, 6] = die
    with pytest.raises(SystemExit):
        shop.pump()
    shop.lose_leases()
    preparations[:] = [False, True]
    shop.pump()
    assert (shop.get_job(job_id).status, micro_batch(shop, job_id)) == ("succeeded", 2)
    assert sha(shop, job_id) == sha(shop, undisturbed)
    assert not any("unreadable" in message for message in shop.messages(job_id))


def test_a_job_that_is_cancelled_before_it_is_prepared_is_not(shop: Shop) -> None:
    job_id = shop.job(**JOB)
    training = CoTraining(shop.runtime)
    assert training.claim()
    with shop.services.database.write() as session:
        jobs.cancel_job(session, shop.tenant_id, job_id)
    training.advance()
    assert training.is_empty
    assert shop.get_job(job_id).status == "cancelled"


def test_a_pass_that_is_too_large_for_memory_is_parted_before_any_job_is(shop: Shop, limit: list[int]) -> None:
    alone = shop.job(**JOB)
    shop.pump()
    limit[0] = 8
    mine, theirs = shop.job(**JOB), shop.rival().job(**JOB)
    shop.pump()
    assert [micro_batch(shop, job_id) for job_id in (mine, theirs)] == [8, 8]
    assert sha(shop, mine) == sha(shop, alone)
    assert shop.get_job(theirs).status == "succeeded"


def test_a_job_that_never_fits_fails_before_its_first_step(shop: Shop, limit: list[int]) -> None:
    limit[0] = 0
    job_id = shop.job(**JOB)
    shop.pump()
    job = shop.get_job(job_id)
    assert (job.status, (job.error or {})["code"]) == ("failed", "out_of_memory")
