"""What training rows cost in memory, measured on the base itself; how much is free; how large a micro-batch may be."""

import math
import resource
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from core.diffusion.base import Base
from core.errors import Unavailable
from core.out_of_memory import halved, is_out_of_memory
from core.training.data import TrainingData
from core.training.loop import advance
from core.training.spec import TrainSpec
from core.training.trainee import Trainee, TrainState, layout_of

_ROWS = 2
_PASSING = 1.5
"""What a pass takes at its peak over what it keeps for the way back: the largest temporaries beside it."""


def row_bytes(base: Base, data: TrainingData, spec: TrainSpec) -> int:
    """Bytes that each row of a pass takes, from a step of a state that is thrown away."""
    frozen = {parameter.untyped_storage().data_ptr() for parameter in base.network.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        advance(base, [trial(base, data, spec, _ROWS)])
    return int(sum(kept.values()) / _ROWS * _PASSING)


class OutOfMemory(Unavailable):
    """Not even one row has room."""

    code = "out_of_memory"


def fit_micro_batch(base: Base, data: TrainingData, spec: TrainSpec, cost: int, room: int) -> int:
    """The batch (a process's share of it), halved until at `cost` bytes a row it fits into `room`, and a step works.

    The step is of a state that is thrown away. Raises OutOfMemory.
    """
    rows = math.ceil(spec.batch_size / spec.devices)
    while rows > 1 and rows * cost > room:
        rows = halved(rows)
    while not _works(base, data, spec, rows):
        if rows == 1:
            raise OutOfMemory("a training step of one row does not fit into the memory of this device")
        rows = halved(rows)
    return rows


def _works(base: Base, data: TrainingData, spec: TrainSpec, rows: int) -> bool:
    try:
        advance(base, [trial(base, data, spec, rows)])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def trial(base: Base, data: TrainingData, spec: TrainSpec, rows: int) -> Trainee:
    """A trainee like the job's with so many rows in a pass; nobody keeps its state."""
    spec = replace(spec, batch_size=rows, devices=1, steps=spec.steps + 2, validation_every=spec.steps + 2)
    classes = len(data.classes)
    size = layout_of(base, spec).parameter_count(classes)
    return Trainee(base, data, spec, TrainState.zero(size, (None,) * classes, base.device))


def free_bytes(device: torch.device) -> int:
    """What a pass may still take before somebody refuses: the device, the machine, the container or a limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_free_in_machine(), _free_in_container(), _free_in_process())


def _free_in_machine() -> int:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**62


def _free_in_container() -> int:
    """Control groups, version 2."""
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if not limit or not used or limit[0] == "max":
        return 2**62
    return max(0, int(limit[0]) - int(used[0]))


def _free_in_process() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _lines("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not pages:
        return 2**62
    return max(0, limit - int(pages[0].split()[0]) * resource.getpagesize())


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
