"""How the numbers of a job come about: part of its record, since another way gives other bits."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from core.diffusion.base import Base
from core.training.spec import TrainSpec

RowPath = Literal["row", "fused"]
Packing = Literal["exact", "shared"]


@dataclass(frozen=True)
class NumericPath:
    """How the numbers of a job come about; fixed before step 0, since another path gives other bits."""

    torch: str
    device: str
    threads: int
    dtype: str
    rows: RowPath
    micro_batch: int
    world: int = 1  # processes that share a step's rows
    packing: Packing = "exact"
    """`exact`: who shares its passes changes no bit of the job, or nobody does; `shared`: it may."""
    compiled: bool = False  # docs/decisions/0015

    @property
    def is_steady(self) -> bool:
        """Whether a job has the same bits alone and in any company (docs/decisions/0011)."""
        return (self.device, self.threads, self.rows, self.world) == ("cpu", 1, "row", 1)

    def may_share(self, other: "NumericPath") -> bool:
        """Whether jobs of these paths may train in one pass."""
        if self.packing == other.packing == "shared" and self.world == 1:
            return replace(self, micro_batch=other.micro_batch) == other
        is_alike = (self.dtype, self.compiled) == (other.dtype, other.compiled)
        return self.is_steady and other.is_steady and is_alike

    def to_json(self) -> dict[str, Any]:
        """As the job's row and its checkpoints have it."""
        return dict(self.__dict__)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "NumericPath":
        """Read back what `to_json` wrote. Raises TypeError for parts that this version does not know."""
        return cls(**data)


def ask_for_determinism(device: torch.device) -> None:
    """Before a GPU is first used: of its kernels those that add in one order, so that a resumed job has the same bits.

    CPUs add in one order for a count of threads. An operation that has no such kernel warns: no job fails for it.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may choose another algorithm each time
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def numeric_path(base: Base, spec: TrainSpec, rows: RowPath = "row", compiled: bool = False) -> NumericPath:
    """The path of a job on this machine; `compiled` where the base can."""
    device = base.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(base.device)
    dtype = str(base.dtype).removeprefix("torch.")
    threads, micro_batch = torch.get_num_threads(), math.ceil(spec.batch_size / spec.devices)
    return NumericPath(
        torch.__version__,
        device,
        threads,
        dtype,
        rows,
        micro_batch,
        world=spec.devices,
        compiled=compiled and base.can_compile,
    )
