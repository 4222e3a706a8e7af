"""One job over several processes: real ones, with gloo, on the CPU."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.errors import Invalid
from core.settings import PACKAGED_BASE
from core.training import checkpoint
from core.training.checkpoint import CheckpointMismatch
from core.training.crew import Crew
from core.training.data import TrainingData
from core.training.distributed import RankLost, share_of
from core.training.loop import advance, fit, start
from core.training.machine import numeric_path
from core.training.path import NumericPath
from core.training.spec import TrainSpec
from core.training.trainee import Diverged, Progress, Ranks, Trainee, TrainState
from tests.processes import is_running
from tests.training.jobs import make_data, make_spec


@pytest.fixture(scope="module")
def data(latent_base: Base) -> TrainingData:
    return make_data(latent_base, flip=True)


PATIENCE = 8.0  # seconds that an exchange may take


class Crews:
    """One crew at a time, kept from test to test while it is sound: a process takes seconds to start."""

    def __init__(self) -> None:
        self._made: tuple[object, Crew] | None = None
        self.pids: list[int] = []

    def get(self, base: Base, folder: Path, world: int = 2) -> Crew:
        wanted = (base.name, world)
        if self._made is None or self._made[0] != wanted or not self._made[1].is_alive:
            self.close()
            crew = Crew(base, folder, world, timeout_seconds=PATIENCE, start_seconds=120, log_level="critical")
            self._made = wanted, crew
            self.pids += crew.pids
            wait_for(crew)
        return self._made[1]

    def close(self) -> None:
        if self._made is not None:
            self._made[1].close()
        assert [pid for pid in self.pids if is_running(pid)] == []


@pytest.fixture(scope="module")
def crews() -> Iterator[Crews]:
    crews = Crews()
    yield crews
    crews.close()


@pytest.fixture
def crew(crews: Crews, latent_base: Base, latent_folder: Path) -> Crew:
    return crews.get(latent_base, latent_folder)


def wait_for(crew: Crew) -> None:
    while not crew.is_ready(0.1):
        pass


class Alone:
    """One process that does all the work, in the place of several."""

    world = 1

    def begin(self, step: int) -> None:
        pass

    def share(self, rows: int) -> range:
        return range(rows)

    def sum(self, *parts: Tensor) -> list[Tensor]:
        return [part.clone() for part in parts]


class Seen:
    """What goes into an exchange and what comes out of it."""

    def __init__(self, ranks: Ranks) -> None:
        self.world, self.begin, self.share, self._sum = ranks.world, ranks.begin, ranks.share, ranks.sum

    def sum(self, *parts: Tensor) -> list[Tensor]:
        self.given, self.got = [part.clone() for part in parts], self._sum(*parts)
        return [part.clone() for part in self.got]


def one_step(base: Base, data: TrainingData, spec: TrainSpec, ranks: Ranks, state: TrainState) -> Seen:
    seen = Seen(ranks)
    path = replace(numeric_path(base, spec), world=ranks.world)
    if isinstance(ranks, Crew):
        ranks.join(data, spec, state, path)
    advance(base, [Trainee(base, data, spec, state, path, seen)])
    return seen


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def some_state(base: Base, data: TrainingData, spec: TrainSpec) -> TrainState:
    """Not zero, where every gradient of γ and of the biases has its own size."""
    state = start(base, data, spec)
    state.vector.add_(0.05 * torch.randn(len(state.vector), generator=torch.Generator().manual_seed(3)))
    return state


@pytest.mark.parametrize("options", [{"batch_size": 8}, {"batch_size": 5, "min_snr_gamma": 5.0}])
def test_the_gradients_of_a_step_are_those_of_one_process(
    latent_base: Base, data: TrainingData, crew: Crew, options: dict[str, Any]
):
    spec = make_spec(latent_base, devices=2, clip_norm=1e6, **options)
    whole = one_step(latent_base, data, spec, Alone(), some_state(latent_base, data, spec))
    shared = one_step(latent_base, data, spec, crew, some_state(latent_base, data, spec))
    gradient, losses = shared.got
    assert apart(gradient, whole.got[0]) < 1e-6
    assert apart(losses, whole.got[1]) < 1e-6
    assert apart(shared.given[0], whole.got[0]) > 0.1, "a process without the others must be far away"
    assert (shared.given[1] == 0).sum() == spec.batch_size - len(crew.share(spec.batch_size))


def test_so_they_are_on_the_base_that_ships(crews: Crews):
    base = load_base(PACKAGED_BASE)
    data = make_data(base, per_class=3)
    spec = make_spec(base, devices=2, batch_size=4, clip_norm=1e6)
    whole = one_step(base, data, spec, Alone(), some_state(base, data, spec))
    shared = one_step(base, data, spec, crews.get(base, PACKAGED_BASE), some_state(base, data, spec))
    assert apart(shared.got[0], whole.got[0]) < 1e-6
    assert apart(shared.given[0], whole.got[0]) > 0.1


def test_all_ranks_are_at_the_same_state_bit_for_bit_after_every_step(
    latent_base: Base, data: TrainingData, crew: Crew
):
    spec = make_spec(latent_base, devices=2, steps=6, validation_every=3, flip=True)
    for progress in led(crew, latent_base, data, spec):
        crew.verify(progress.state)
    assert progress.val_loss is not None
    progress.state.second[-1] += 1e-9
    with pytest.raises(RankLost, match="differ after step 6"):
        crew.verify(progress.state)
    assert not crew.is_alive


def test_a_job_left_at_any_step_ends_in_the_same_bytes(latent_base: Base, data: TrainingData, crew: Crew):
    spec = make_spec(latent_base, devices=2, steps=6, batch_size=5)
    path = numeric_path(latent_base, spec)
    assert path.world == 2
    *_, last = led(crew, latent_base, data, spec)
    wanted = digest(last.state, spec, data, path)
    for left_at in (1, 5):
        [*_, last] = islice(led(crew, latent_base, data, spec), left_at)
        saved = checkpoint.dump(last.state, spec.digest, data.digest, path)
        crew.leave()
        state = checkpoint.load(saved, spec.digest, data.digest, path)
        *_, last = led(crew, latent_base, data, spec, state)
        assert digest(last.state, spec, data, path) == wanted, left_at
    with pytest.raises(CheckpointMismatch, match="world 2, this run 1"):
        checkpoint.load(saved, spec.digest, data.digest, replace(path, world=1))


def test_a_lead_that_is_busy_for_longer_than_an_exchange_may_take_keeps_its_crew(
    latent_base: Base, data: TrainingData, crew: Crew
):
    steps = led(crew, latent_base, data, make_spec(latent_base, devices=2, steps=2))
    next(steps)
    time.sleep(PATIENCE + 1)
    assert next(steps).step == 2


def test_a_job_that_diverges_does_so_on_all_ranks(latent_base: Base, data: TrainingData, crew: Crew):
    spec = make_spec(latent_base, devices=2)
    state = start(latent_base, data, spec)
    state.vector[0] = float("nan")
    with pytest.raises(Diverged):
        list(led(crew, latent_base, data, spec, state))
    crew.verify(state)


def test_a_process_that_hangs_is_not_waited_for(latent_base: Base, data: TrainingData, crew: Crew):
    steps = led(crew, latent_base, data, make_spec(latent_base, devices=2))
    next(steps)
    os.kill(crew.pids[0], signal.SIGSTOP)
    with pytest.raises(RankLost, match="does not answer"):
        list(steps)
    crew.leave()
    assert not is_running(crew.pids[0])


def test_a_step_that_the_lead_does_not_finish_ends_the_crew(latent_base: Base, data: TrainingData, crew: Crew):
    spec = make_spec(latent_base, devices=2)
    crew.join(data, spec, start(latent_base, data, spec), numeric_path(latent_base, spec))
    crew.begin(0)
    crew.leave()
    assert not crew.is_alive
    assert not is_running(crew.pids[0])


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [7, 8, 64])
def test_every_row_is_one_ranks_and_none_has_much_more_than_another(rows: int, world: int):
    shares = [share_of(rows, rank, world) for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_three_processes_do_what_two_do(crews: Crews, latent_base: Base, latent_folder: Path, data: TrainingData):
    spec = make_spec(latent_base, devices=3, batch_size=7, clip_norm=1e6)
    whole = one_step(latent_base, data, spec, Alone(), some_state(latent_base, data, spec))
    three = crews.get(latent_base, latent_folder, world=3)
    shared = one_step(latent_base, data, spec, three, some_state(latent_base, data, spec))
    assert apart(shared.got[0], whole.got[0]) < 1e-6


def test_a_process_that_is_killed_is_missed_at_once(
    crews: Crews, latent_base: Base, latent_folder: Path, data: TrainingData
):
    crew = crews.get(latent_base, latent_folder, world=3)
    steps = led(crew, latent_base, data, make_spec(latent_base, devices=3))
    next(steps)
    os.kill(crew.pids[1], signal.SIGKILL)
    with pytest.raises(RankLost, match="process 2 of this job ended: it said nothing"):
        list(steps)
    crew.leave()
    assert not crew.is_alive
    assert [pid for pid in crew.pids if is_running(pid)] == []


def test_a_process_that_cannot_start_says_why(latent_base: Base, tmp_path: Path):
    crew = Crew(latent_base, tmp_path, 2, timeout_seconds=60, start_seconds=120, log_level="critical")
    with pytest.raises(RankLost, match=r"did not start: .*model_index\.json"):
        wait_for(crew)
    crew.leave()
    assert not is_running(crew.pids[0])


def test_a_job_of_several_processes_takes_no_step_in_one(latent_base: Base, data: TrainingData):
    spec = make_spec(latent_base, devices=2)
    with pytest.raises(Invalid, match="has 2 processes"):
        next(fit(latent_base, data, spec))


LEAD = """
import sys
from pathlib import Path
from core.diffusion.families import load_base
from core.training.crew import Crew
from core.training.loop import fit, start
from core.training.machine import numeric_path
from tests.training.jobs import make_data, make_spec

folder = Path(sys.argv[1])
base = load_base(folder)
data, spec = make_data(base), make_spec(base, devices=2, steps=10_000)
crew = Crew(base, folder, 2, timeout_seconds=60, start_seconds=120, log_level="critical")
while not crew.is_ready(0.1):
    pass
state = start(base, data, spec)
crew.join(data, spec, state, numeric_path(base, spec))
for progress in fit(base, data, spec, state, ranks=crew):
    print(crew.pids[0], flush=True)
"""


def test_no_process_outlives_its_lead(latent_folder: Path):
    command = [sys.executable, "-c", LEAD, str(latent_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as lead:
        assert lead.stdout is not None
        rank = int(lead.stdout.readline())
        assert is_running(rank)
        lead.kill()
    until = time.monotonic() + 30
    while is_running(rank) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(rank)


def led(
    crew: Crew, base: Base, data: TrainingData, spec: TrainSpec, state: TrainState | None = None
) -> Iterator[Progress]:
    state = state or start(base, data, spec)
    path = numeric_path(base, spec)
    crew.join(data, spec, state, path)
    yield from fit(base, data, spec, state, path, crew)


def digest(state: TrainState, spec: TrainSpec, data: TrainingData, path: NumericPath) -> str:
    return hashlib.sha256(checkpoint.dump(state, spec.digest, data.digest, path)).hexdigest()
