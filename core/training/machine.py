"""What this machine does with a job's numbers."""

import math
import os

import torch

from core.diffusion.base import Base
from core.training.path import NumericPath, RowPath
from core.training.spec import TrainSpec


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
