"""Exact resume: killed after any step, on one thread and on two, a job ends in the bytes of one that never was."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.diffusion.tiny import make_pipeline
from tests.training.killed import CHECKPOINT_EVERY, STEPS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts its threads in /proc")
SIGKILL = 9

Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Train in a process of its own, in a folder by name."""
    folder = tmp_path_factory.mktemp("killed")
    base = make_pipeline(folder / "base", vae=False, sample_size=16, layers=2, heads=4, head_dim=16)
    command = [sys.executable, "-m", "tests.training.killed", str(base)]
    # As the worker has it: a thread that waits for its twin must not burn the core that the twin needs.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("OMP_NUM_THREADS", None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(name: str, threads: int, kill_at: int | None = None, broken: str | None = None) -> dict[str, Any]:
            (folder / name).mkdir(exist_ok=True)
            asked = {"folder": str(folder / name), "threads": threads, "kill_at": kill_at, "broken": broken}
            print(json.dumps(asked), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_job_killed_after_any_step_ends_in_the_same_bytes(train: Train, threads: int) -> None:
    undisturbed = train(f"undisturbed-{threads}", threads)
    assert (undisturbed["signal"], undisturbed["threads"]) == (0, threads)
    for step in range(1, STEPS + 1):
        name = f"{threads}-killed-at-{step}"
        killed = train(name, threads, kill_at=step)
        assert (step, killed["signal"], killed.get("sha256")) == (step, SIGKILL, None)
        resumed = train(name, threads)
        assert (step, resumed["sha256"]) == (step, undisturbed["sha256"])


@pytest.mark.parametrize("broken", ["moments", "seeding"])
def test_a_resume_that_loses_something_is_seen(train: Train, broken: str) -> None:
    """The negative control: wherever a checkpoint was gone on from, the bytes are others."""
    undisturbed = train(f"undisturbed-{broken}", 1, broken=broken)
    for step in (CHECKPOINT_EVERY + 1, STEPS // 2, STEPS):
        name = f"{broken}-killed-at-{step}"
        assert train(name, 1, kill_at=step, broken=broken)["signal"] == SIGKILL
        assert train(name, 1, broken=broken)["sha256"] != undisturbed["sha256"]


def test_a_job_killed_twice_ends_in_the_same_bytes(train: Train) -> None:
    undisturbed = train("undisturbed-again", 1)
    assert train("twice", 1, kill_at=5)["signal"] == SIGKILL
    assert train("twice", 1, kill_at=9)["signal"] == SIGKILL  # its ninth step after step 3
    assert train("twice", 1)["sha256"] == undisturbed["sha256"]
