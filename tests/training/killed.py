"""`python -m tests.training.killed BASE`: trains in processes that it forks, one for each line of JSON on stdin.

A line `{"folder", "threads", "kill_at", "broken"}` begins a training run in that folder, or goes on with the one that
is there; `kill_at` is the step after which the process kills itself with SIGKILL. The answer, a line of JSON, says by
which signal it ended, on how many threads it ran and, where it came to its end, the adapter's sha256.

The forks share what takes long, torch and the base; before them nothing runs that would start a thread.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core import faults
from core.adapters import format as adapter_format
from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.training import checkpoint, trainee
from core.training.data import TrainingData
from core.training.loop import finish, fit
from core.training.machine import numeric_path
from core.training.path import NumericPath
from core.training.randomness import generator
from core.training.spec import TrainSpec
from core.training.trainee import TrainState
from tests.training.jobs import make_data, make_spec

STEPS, CHECKPOINT_EVERY = 20, 3


def main(folder: str) -> None:
    torch.set_num_threads(1)
    base = load_base(Path(folder))
    # 21 images to train on, 8 a step: epochs end inside of steps, at the end of step 21 / 8, and so on.
    data = make_data(base)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _train(base, data, asked)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        results = Path(asked["folder"]) / "result.json"
        answer = json.loads(results.read_text()) if results.exists() else {}
        ended = {
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            "exit": os.waitstatus_to_exitcode(status),
        }
        sys.stdout.write(json.dumps({**answer, **ended}) + "\n")
        sys.stdout.flush()


def _train(base: Base, data: TrainingData, asked: Mapping[str, Any]) -> None:
    folder = Path(asked["folder"])
    torch.set_num_threads(asked["threads"])
    if asked["kill_at"] is not None:
        os.environ["FAULT"] = f"after_step:{asked['kill_at']}:kill"
    if asked["broken"] == "seeding":
        _draw_without_steps()
    spec = make_spec(base, steps=STEPS, batch_size=8, validation_every=7)
    path = numeric_path(base, spec)
    state = _load(folder, spec, data, path)
    if state is not None and asked["broken"] == "moments":
        state.first.zero_()
        state.second.zero_()
    for progress in fit(base, data, spec, state, path):
        state = progress.state
        faults.point("after_step")
        if progress.step % CHECKPOINT_EVERY == 0:
            _save(folder, checkpoint.dump(state, spec.digest, data.digest, path))
    assert state is not None
    digest = hashlib.sha256(adapter_format.save(finish(state, base, spec, data))).hexdigest()
    threads = len(os.listdir("/proc/self/task"))
    (folder / "result.json").write_text(json.dumps({"sha256": digest, "threads": threads}))


def _load(folder: Path, spec: TrainSpec, data: TrainingData, path: NumericPath) -> TrainState | None:
    file = folder / "checkpoint"
    return checkpoint.load(file.read_bytes(), spec.digest, data.digest, path) if file.exists() else None


def _save(folder: Path, data: bytes) -> None:
    staged = folder / "staged"
    staged.write_bytes(data)
    staged.replace(folder / "checkpoint")


def _draw_without_steps() -> None:
    """One running generator for all steps of a process, as trainers have it that seed once."""
    running = torch.Generator().manual_seed(0)

    def drawn(seed: int, purpose: str, number: int = 0) -> torch.Generator:
        return running if purpose == "step" else generator(seed, purpose, number)

    trainee.generator = drawn


if __name__ == "__main__":
    main(sys.argv[1])
