"""The numeric path that a job would have on this machine."""

import math

import torch

from core.diffusion.base import Base
from core.training.path import NumericPath, RowPath
from core.training.spec import TrainSpec


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
