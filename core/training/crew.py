"""The other processes of a job on several devices: started, told and ended by the process that leads it, rank 0.

They are told over their standard input when to step, so that a lead that is busy elsewhere (it samples, stores,
reports) keeps nobody waiting in an exchange: how long one may take is bounded. A process that dies, hangs or goes
another way raises RankLost; the crew is then ended, and the job goes on from its last checkpoint with another one.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from core.diffusion.base import Base
from core.training.data import TrainingData
from core.training.distributed import Group, RankLost, hand_over
from core.training.path import NumericPath
from core.training.spec import TrainSpec
from core.training.trainee import TrainState

_ROOT = Path(__file__).resolve().parents[2]
_LAST_WORDS_SECONDS = 0.5


class Crew:
    """Ranks 1 and up of jobs on one base, kept from job to job. No process outlives the one that made it."""

    def __init__(
        self, base: Base, folder: Path, world: int, *, timeout_seconds: float, start_seconds: float, log_level: str
    ) -> None:
        """Returns at once: the others take some seconds to load the base from `folder`. Ask `is_ready`, then `join`."""
        self.world = world
        self._base = base
        self._timeout = timeout_seconds
        self._group: Group | None = None
        self._is_open = self._is_sound = True  # sound: all answer, and none is in the middle of a step
        self._ready_by = time.monotonic() + start_seconds
        self._scratch = tempfile.TemporaryDirectory(prefix="difffit-ranks-", ignore_cleanup_errors=True)
        self._rendezvous = Path(self._scratch.name) / "rendezvous"
        place = {
            "folder": str(folder.resolve()),
            "name": base.name,
            "dtype": str(base.dtype).removeprefix("torch."),
            "world": world,
            "rendezvous": str(self._rendezvous),
            "timeout_seconds": timeout_seconds,
            "log_level": log_level,
        }
        self._ranks = [_Rank({**place, "device": _device_of(base.device, rank)}, rank) for rank in range(1, world)]

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    @property
    def is_alive(self) -> bool:
        return self._is_open and self._is_sound and all(rank.is_alive for rank in self._ranks)

    def is_for(self, base: Base, world: int) -> bool:
        """Whether it may serve another job, of this base on so many devices."""
        return self.is_alive and base is self._base and world == self.world

    def is_ready(self, wait_seconds: float = 0.0) -> bool:
        """Whether every process has loaded its base. Raises RankLost where one ended, or takes too long."""
        try:
            ready = [rank.is_ready(self._base.fingerprint, wait_seconds) for rank in self._ranks]
            if not all(ready) and time.monotonic() > self._ready_by:
                raise RankLost("a process of this job takes too long to load its base")
        except RankLost:
            self._is_sound = False
            raise
        return all(ready)

    def join(self, data: TrainingData, spec: TrainSpec, state: TrainState, path: NumericPath) -> None:
        """Hand a job to every rank: from now on they hold the same data and the same state."""
        with self._together():
            self._tell("join")
            if self._group is None:
                self._group = Group(self._rendezvous, 0, self.world, self._base.device, self._timeout)
            hand_over(self._group, data, spec, state, path)

    def begin(self, step: int) -> None:
        """Let every rank start on its share of the step that follows `step`."""
        with self._together():
            self._tell("step", step)
        self._is_sound = False

    def share(self, rows: int) -> range:
        return self._joined.share(rows)

    def sum(self, *parts: Tensor) -> list[Tensor]:
        with self._together():
            summed = self._joined.sum(*parts)
        self._is_sound = True
        return summed

    def verify(self, state: TrainState) -> None:
        """Raises RankLost unless all ranks are at this very state, bit for bit."""
        with self._together():
            self._tell("verify", state.step)
            if not self._joined.agrees(state):
                raise RankLost(f"the processes of this job differ after step {state.step}")

    def leave(self) -> None:
        """The job is over for now. The processes stay for the next one, unless something is wrong with any."""
        try:
            if self.is_alive:
                self._tell("leave")
        except OSError:
            self._is_sound = False
        if not self.is_alive:
            self.close()

    def close(self) -> None:
        """End them; they hold nothing that could be lost."""
        self._is_open = False
        for rank in self._ranks:
            rank.kill()
        if self._group is not None:
            self._group.close()
            self._group = None
        self._scratch.cleanup()

    @property
    def _joined(self) -> Group:
        assert self._group is not None, "join comes first"
        return self._group

    def _tell(self, verb: str, step: int | None = None) -> None:
        """Short words alone: a pipe that nobody reads takes some thousand of them, and an exchange follows each."""
        for rank in self._ranks:
            rank.tell({"do": verb, "step": step})

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Trouble with a process, said in its own words where it left any."""
        try:
            yield
        except (RankLost, OSError) as error:
            self._is_sound = False
            words = next(filter(None, (rank.last_words(_LAST_WORDS_SECONDS) for rank in self._ranks)), str(error))
            raise RankLost(words) from error


class _Rank:
    """One process; a thread reads its answers."""

    def __init__(self, place: Mapping[str, Any], rank: int) -> None:
        self._name = f"process {rank} of this job"
        self._is_ready = False
        python_path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(  # our own interpreter and module
            [sys.executable, "-P", "-m", "core.training.rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": python_path},
            start_new_session=True,  # a signal to the worker's group is the worker's to answer
        )
        self._answers: SimpleQueue[dict[str, str]] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True, name="rank-answers")
        self._reader.start()
        self.tell({**place, "rank": rank})

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def is_ready(self, fingerprint: str, wait_seconds: float) -> bool:
        if not self._is_ready and (answer := self._answer(wait_seconds)) is not None:
            if answer.get("ready") != fingerprint:
                raise RankLost(f"{self._name} did not start: {answer.get('error', 'it ended, or has another base')}")
            self._is_ready = True
        return self._is_ready

    def tell(self, order: Mapping[str, Any]) -> None:
        """Raises OSError where it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def last_words(self, wait_seconds: float) -> str | None:
        """What it said on its way out; None while it is there, or where it says no more than that another was lost."""
        answer = self._answer(wait_seconds)
        if answer is None or answer.get("error", "").startswith(RankLost.__name__):
            return None
        return f"{self._name} ended: {answer.get('error', 'it said nothing')}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # the last order was never read

    def _answer(self, wait_seconds: float) -> dict[str, str] | None:
        try:
            return self._answers.get(block=wait_seconds > 0, timeout=wait_seconds)
        except Empty:
            return None

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._answers.put(json.loads(line))
        self._answers.put({})  # it has ended


def _device_of(lead: torch.device, rank: int) -> str:
    """A rank's device: the CPU for all, or the GPUs that follow the lead's own."""
    if lead.type != "cuda":
        return lead.type
    first = torch.cuda.current_device() if lead.index is None else lead.index
    return f"cuda:{first + rank}"
