"""Jobs of several tenants in one pass: each ends as it would have alone, whatever becomes of the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import update

from core.jobs import service as jobs
from core.models import Job, Tenant
from core.training.trainee import Diverged, Progress, Trainee
from tests.worker.shop import Shop
from worker import app, cotraining
from worker.runtime import cpu_threads
from worker.slice import Slice

KILLED = -9

MINE = {"steps": 12, "batch_size": 4}
THEIRS = {"steps": 9, "batch_size": 6, "learning_rate": 0.002, "checkpoint_every": 3, "seed": 3}


@dataclass
class Passes:
    """The passes that were run, and what is to happen before the nth."""

    sizes: list[int] = field(default_factory=list)
    before: dict[int, Callable[[], None]] = field(default_factory=dict)


@pytest.fixture
def passes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Passes:
    shop.services.settings.poll_seconds = 0.001  # jobs are looked for between any two passes, however short these are
    seen = Passes()
    real = cotraining.advance

    def advance(base: Any, trainees: Sequence[Trainee]) -> list[Progress | Diverged]:
        seen.sizes.append(len(trainees))
        seen.before.get(len(seen.sizes), lambda: None)()
        return real(base, trainees)

    monkeypatch.setattr(cotraining, "advance", advance)
    return seen


def alone(shop: Shop, **hyperparameters: Any) -> str:
    """The sha256 of a job that shares nothing with anybody."""
    job_id = shop.job(**hyperparameters)
    shop.pump()
    return sha(shop, job_id)


def sha(shop: Shop, job_id: str) -> str:
    [adapter] = shop.adapters(job_id)
    return adapter.sha256


def state_of(shop: Shop, job_id: str) -> tuple[str, str | None]:
    job = shop.get_job(job_id)
    return job.status, (job.error or {}).get("code")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_tenants_jobs_in_one_pass_end_as_each_would_alone(shop: Shop, passes: Passes, dtype: Any) -> None:
    shop.services.settings.train_dtype = dtype
    rival = shop.rival()
    wanted = alone(shop, **MINE), alone(rival, **THEIRS)
    assert set(passes.sizes) == {1}
    passes.sizes.clear()
    mine, theirs = shop.job(**MINE), rival.job(**THEIRS)
    shop.pump()
    assert (sha(shop, mine), sha(shop, theirs)) == wanted
    assert passes.sizes.count(2) >= 8
    assert 1 in passes.sizes  # the shorter one left


KILLS_AT_SEED_666 = """
import os
from worker import cotraining
real = cotraining.advance
def advance(base, trainees):
    if any(trainee.spec.seed == 666 for trainee in trainees):
        os.kill(os.getpid(), 9)
    return real(base, trainees)
cotraining.advance = advance
"""


def test_a_job_that_kills_every_worker_takes_no_neighbour_with_it(shop: Shop) -> None:
    rival = shop.rival()
    neighbour, poison = shop.job(**MINE, checkpoint_every=100), rival.job(**MINE, checkpoint_every=100, seed=666)
    codes: list[int] = []
    while not codes or codes[-1] == KILLED:
        codes.append(shop.pump_elsewhere(before=KILLS_AT_SEED_666))
        shop.lose_leases()
    assert codes == [KILLED] * 3 + [0]
    assert (state_of(shop, poison), state_of(shop, neighbour)) == (("failed", "crashed"), ("succeeded", None))
    assert shop.get_job(neighbour).attempt == 2


def test_what_workers_died_with_is_tried_again_one_at_a_time(shop: Shop, passes: Passes) -> None:
    together = [shop.job(**MINE), shop.rival().job(**MINE)]
    with shop.services.database.write() as session:
        session.execute(update(Job).values(crashes=1))
    shop.pump()
    assert [state_of(shop, job_id) for job_id in together] == [("succeeded", None)] * 2
    assert passes.sizes[:4] == [1] * 4  # until it has a checkpoint, which clears it
    assert 2 in passes.sizes


def test_a_worker_killed_in_a_shared_pass_loses_no_bit_of_any(shop: Shop) -> None:
    rival = shop.rival()
    wanted = alone(shop, **MINE), alone(rival, **THEIRS)
    for fault in ("after_step:9", "before_pointer_commit:3", "final_put:1"):
        mine, theirs = shop.job(**MINE), rival.job(**THEIRS)
        assert shop.pump_elsewhere(f"{fault}:kill") == KILLED
        shop.lose_leases()
        shop.pump()
        assert (fault, sha(shop, mine), sha(shop, theirs)) == (fault, *wanted)


def test_a_job_that_diverges_fails_alone(shop: Shop, passes: Passes) -> None:
    wanted = alone(shop, **MINE)
    mine, wild = shop.job(**MINE), shop.rival().job(**THEIRS, clip_norm=1e6, warmup_steps=0)
    with shop.services.database.write() as session:
        spec = dict(shop.get_job(wild).spec or {}) | {"learning_rate": 1e30}
        session.execute(update(Job).where(Job.id == wild).values(spec=spec))
    shop.pump()
    assert 2 in passes.sizes
    assert state_of(shop, wild) == ("failed", "diverged")
    assert shop.adapters(wild) == []
    assert sha(shop, mine) == wanted


def test_a_job_that_breaks_the_pass_breaks_alone(shop: Shop, passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = alone(shop, **MINE)
    real = Trainee.draw

    def draw(trainee: Trainee) -> Any:
        if trainee.spec.seed == THEIRS["seed"] and trainee.state.step == 4:
            raise RuntimeError("no such draw")
        return real(trainee)

    monkeypatch.setattr(Trainee, "draw", draw)
    mine, broken = shop.job(**MINE), shop.rival().job(**THEIRS)
    shop.pump()
    assert 2 in passes.sizes
    assert state_of(shop, broken) == ("failed", "crashed")  # after as many attempts as the settings grant
    assert sha(shop, mine) == wanted


@pytest.mark.parametrize("verb", [jobs.cancel_job, jobs.pause_job])
def test_a_job_that_is_stopped_leaves_the_others_as_they_are(shop: Shop, passes: Passes, verb: Any) -> None:
    rival = shop.rival()
    wanted = alone(shop, **MINE), alone(rival, **THEIRS)
    passes.sizes.clear()
    mine, theirs = shop.job(**MINE), rival.job(**THEIRS)

    def stop() -> None:
        with shop.services.database.write() as session:
            verb(session, rival.tenant_id, theirs)

    passes.before[6] = stop
    shop.pump()
    assert passes.sizes.count(2) >= 4
    assert sha(shop, mine) == wanted[0]
    assert state_of(shop, theirs)[0] == ("cancelled" if verb is jobs.cancel_job else "paused")
    if verb is jobs.pause_job:
        with shop.services.database.write() as session:
            jobs.resume_job(session, rival.tenant_id, theirs)
        shop.pump()
        assert sha(shop, theirs) == wanted[1]


def test_a_job_joins_between_two_steps(shop: Shop, passes: Passes) -> None:
    rival = shop.rival()
    wanted = alone(shop, **MINE), alone(rival, **THEIRS)
    passes.sizes.clear()
    mine, late = shop.job(**MINE), []
    passes.before[4] = lambda: late.append(rival.job(**THEIRS))
    shop.pump()
    assert passes.sizes[:4] == [1] * 4
    assert 2 in passes.sizes
    assert (sha(shop, mine), sha(shop, late[0])) == wanted


def test_slices_of_a_step_each_end_in_the_same_bytes(shop: Shop) -> None:
    """The last step is among those after which the job goes back to the queue."""
    rival = shop.rival()
    wanted = alone(shop, **MINE), alone(rival, **THEIRS)
    shop.services.settings.slice_seconds = 0.02
    mine, theirs = shop.job(**MINE), rival.job(**THEIRS)
    while not (shop.adapters(mine) and shop.adapters(theirs)):
        shop.pump()
        assert shop.get_job(mine).attempt < 30
    assert (sha(shop, mine), sha(shop, theirs)) == wanted
    assert shop.get_job(mine).attempt > 3


def test_a_job_stopped_at_its_last_step_publishes_the_same_bytes(shop: Shop, passes: Passes) -> None:
    wanted = alone(shop, **MINE)
    passes.sizes.clear()
    mine = shop.job(**MINE)

    def pause() -> None:
        with shop.services.database.write() as session:
            jobs.pause_job(session, shop.tenant_id, mine)

    passes.before[12] = pause
    shop.pump()
    assert (state_of(shop, mine)[0], shop.get_job(mine).step) == ("paused", 12)
    with shop.services.database.write() as session:
        jobs.resume_job(session, shop.tenant_id, mine)
    shop.pump()
    assert sha(shop, mine) == wanted


def test_a_worker_that_shuts_down_gives_all_of_them_back(
    shop: Shop, passes: Passes, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    rival = shop.rival()
    wanted = alone(shop, **MINE), alone(rival, **THEIRS)
    passes.sizes.clear()
    mine, theirs = shop.job(**MINE), rival.job(**THEIRS)
    monkeypatch.setenv(app.STOP_FILE, str(tmp_path / "stop"))
    passes.before[7] = (tmp_path / "stop").touch
    shop.pump()
    assert [shop.get_job(job_id).status for job_id in (mine, theirs)] == ["queued", "queued"]
    assert [shop.get_job(job_id).crashes for job_id in (mine, theirs)] == [0, 0]
    (tmp_path / "stop").unlink()
    shop.pump()
    assert (sha(shop, mine), sha(shop, theirs)) == wanted


def test_device_time_is_charged_by_rows(shop: Shop, passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = shop.rival()
    charged: dict[str, list[float]] = {}
    real = Slice.took

    def took(self: Slice, outcome: Any, device_seconds: float) -> None:
        charged.setdefault(self.plan.tenant_id, []).append(device_seconds)
        real(self, outcome, device_seconds)

    monkeypatch.setattr(Slice, "took", took)
    shop.job(steps=8, batch_size=4)
    rival.job(steps=8, batch_size=12)
    shop.pump()
    together = passes.sizes.count(2)
    assert together >= 6
    pairs = list(zip(charged[shop.tenant_id][-together:], charged[rival.tenant_id][:together], strict=True))
    assert all(theirs == pytest.approx(3 * mine) for mine, theirs in pairs)
    with shop.services.database.read() as session:
        used = {one: session.get_one(Tenant, one).device_seconds for one in charged}
    assert all(used[one] >= sum(charged[one]) for one in charged)


def test_a_pass_has_no_more_rows_and_jobs_than_the_settings_say(shop: Shop, passes: Passes) -> None:
    shop.services.settings.max_train_rows = 9
    made = [shop.job(steps=4, batch_size=4) for _ in range(4)]
    shop.pump()
    assert max(passes.sizes) == 2
    passes.sizes.clear()
    shop.services.settings.max_train_rows, shop.services.settings.max_train_jobs = 100, 3
    made += [shop.job(steps=4, batch_size=4) for _ in range(4)]
    made.append(shop.job(steps=4, batch_size=200))  # more rows than a pass may have: alone
    shop.pump()
    assert max(passes.sizes) == 3
    assert {state_of(shop, job_id) for job_id in made} == {("succeeded", None)}


def test_a_pass_has_no_more_rows_than_the_memory_holds(
    shop: Shop, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.runtime.free_bytes", lambda _: 0)
    made = [shop.job(steps=4) for _ in range(2)]
    shop.pump()
    assert set(passes.sizes) == {1}
    assert {state_of(shop, job_id) for job_id in made} == {("succeeded", None)}


def test_another_layout_waits_no_longer_than_a_slice(shop: Shop, passes: Passes) -> None:
    shop.services.settings.slice_seconds = 1.5
    long = [shop.job(steps=2000) for _ in range(2)]
    other = shop.rival().job(steps=1, layout="bitfit")
    shop.pump()
    assert [shop.get_job(job_id).step > 0 for job_id in (*long, other)] == [True, True, False]
    shop.pump()
    assert shop.get_job(other).step == 1
    assert 2 in passes.sizes
    assert all(shop.get_job(job_id).status == "queued" for job_id in long)


@pytest.mark.parametrize(("packing", "size"), [("exact", 1), ("always", 2), ("off", 1)])
def test_where_bits_would_change_the_setting_decides(shop: Shop, passes: Passes, packing: Any, size: int) -> None:
    shop.services.settings.packing = packing
    made = [shop.job(steps=6) for _ in range(2)]
    with cpu_threads(2):
        shop.pump()
    assert max(passes.sizes) == size
    paths = [shop.get_job(job_id).numeric_path or {} for job_id in made]
    assert {path["packing"] for path in paths} == {"shared" if packing == "always" else "exact"}
    assert {state_of(shop, job_id) for job_id in made} == {("succeeded", None)}


def test_jobs_take_turns_while_pictures_are_waited_for(shop: Shop, passes: Passes) -> None:
    wanted = alone(shop, **MINE), alone(shop, **THEIRS)
    passes.sizes.clear()
    mine, theirs = shop.job(**MINE), shop.job(**THEIRS)
    drawn: list[str] = []
    passes.before[6] = lambda: drawn.append(shop.sample(steps=200))
    shop.pump()
    assert 2 in passes.sizes[:6]
    assert 1 in passes.sizes[6:10]
    assert shop.get_sample(drawn[0]).status == "succeeded"
    assert (sha(shop, mine), sha(shop, theirs)) == wanted
