"""One job over several processes: each computes a share of a step's rows, and all take the step of the sum.

Every rank draws the whole step from (seed, step) and keeps its share of the rows, so chance does not know how many
there are. What travels between them is the gradient of θ and of the class rows, a few MB a step, and the rows' losses.
Rank 0 is the worker's own process (`core.training.crew`), the others are `core.training.rank`. All run on one machine.
"""

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.diffusion.base import Base
from core.training.data import TrainingData
from core.training.path import NumericPath
from core.training.spec import TrainSpec
from core.training.trainee import Trainee, TrainState

# The processes of a job find each other on the loopback interface, whatever the machine's name resolves to.
_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
_DATA = ("mean", "deviation", "labels", "train")
_KINDS = {"float32": torch.float32, "int64": torch.int64, "uint8": torch.uint8}


class RankLost(RuntimeError):
    """A process of the job has died, hangs or has gone another way; the message says which, where that is known."""


class Group:
    """The processes of one job, as one of them sees them: what one calls, all must call.

    A call that is not answered by all within `timeout_seconds` raises RankLost; the group is then of no use any more.
    """

    def __init__(self, rendezvous: Path, rank: int, world: int, device: torch.device, timeout_seconds: float) -> None:
        """Waits for the others. `rendezvous` names a file that is not there yet, the same for all."""
        self.rank = rank
        self.world = world
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _INTERFACE)
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a collective that hangs raises, as gloo's do
        hook = sys.excepthook
        try:
            with _answered():
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                    init_method=f"file://{rendezvous}",
                    rank=rank,
                    world_size=world,
                    timeout=datetime.timedelta(seconds=timeout_seconds),
                )
        finally:
            sys.excepthook = hook  # torch puts "[rank0]:" before each line of every later traceback

    def begin(self, step: int) -> None:
        """A follower steps when it is told to; see `core.training.crew` for the lead."""

    def share(self, rows: int) -> range:
        """Which of a step's rows this rank computes."""
        return share_of(rows, self.rank, self.world)

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """Each float32 tensor's sum over the ranks, the same bits on all of them, in one exchange."""
        flat = torch.cat([part.flatten() for part in parts])
        with _answered():
            dist.all_reduce(flat)
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]

    def agrees(self, state: TrainState) -> bool:
        """Whether the state is the same on all ranks, bit for bit."""
        mine = torch.frombuffer(bytearray(_digest(state)), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        with _answered():
            dist.all_gather(every, mine)
        return all(torch.equal(one, mine) for one in every)

    def send(self, words: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Rank 0's: JSON and tensors to every other rank, which receives them."""
        shapes = {name: (list(tensor.shape), str(tensor.dtype).split(".")[1]) for name, tensor in tensors.items()}
        encoded = json.dumps({**words, "tensors": shapes}).encode()
        self._from_lead(torch.tensor([len(encoded)]))
        self._from_lead(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
        for tensor in tensors.values():
            self._from_lead(tensor.detach().cpu().contiguous())

    def receive(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What rank 0 sends: its words and its tensors, on the CPU."""
        length = self._from_lead(torch.zeros(1, dtype=torch.long))
        words: dict[str, Any] = json.loads(
            self._from_lead(torch.zeros(int(length), dtype=torch.uint8)).numpy().tobytes()
        )
        shapes = words.pop("tensors")
        tensors = {name: torch.empty(shape, dtype=_KINDS[kind]) for name, (shape, kind) in shapes.items()}
        return words, {name: self._from_lead(tensor) for name, tensor in tensors.items()}

    def _from_lead(self, tensor: Tensor) -> Tensor:
        with _answered():
            dist.broadcast(tensor, src=0)
        return tensor

    def close(self) -> None:
        """Leave, whether the others do or not; another group may then be made."""
        if dist.is_initialized():
            dist.destroy_process_group()


def share_of(rows: int, rank: int, world: int) -> range:
    """One rank's rows: every row has one rank, and no rank has more than one row more than another."""
    return range(rows * rank // world, rows * (rank + 1) // world)


def hand_over(group: Group, data: TrainingData, spec: TrainSpec, state: TrainState, path: NumericPath) -> None:
    """Give the other ranks all that they need to take part in a job from this state on."""
    words = {
        "spec": spec.to_json(),
        "path": path.to_json(),
        "classes": list(data.classes),
        "digest": data.digest,
        "step": state.step,
        "class_start": list(state.class_start),
    }
    learnt = {name: getattr(state, name) for name in TrainState.TENSORS}
    group.send(words, {name: getattr(data, name) for name in _DATA} | learnt)


def take_over(group: Group, base: Base) -> Trainee:
    """What `hand_over` gives, as a follower's part of the job. What is held out stays with the lead, who measures."""
    words, tensors = group.receive()
    path = NumericPath.from_json(words["path"])
    torch.set_num_threads(path.threads)
    data = TrainingData(
        **{name: tensors[name] for name in _DATA},
        classes=tuple(words["classes"]),
        held_out=torch.zeros(0, dtype=torch.long),
        digest=words["digest"],
    )
    moved = {name: tensors[name].to(base.device) for name in TrainState.TENSORS}
    state = TrainState(**moved, step=words["step"], class_start=tuple(words["class_start"]))
    return Trainee(base, data, TrainSpec.from_json(words["spec"]), state, path, group)


def _digest(state: TrainState) -> bytes:
    """sha256 of everything that a job has learnt."""
    digest = hashlib.sha256(str(state.step).encode())
    for name in TrainState.TENSORS:
        digest.update(getattr(state, name).detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()


@contextmanager
def _answered() -> Iterator[None]:
    """torch says by several kinds of RuntimeError that another process is gone or slow."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"a process of this job does not answer: {str(error).splitlines()[0][:200]}") from error
