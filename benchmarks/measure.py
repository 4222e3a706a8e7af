"""What every benchmark shares: interleaved timing, bytes that training holds, and the record of a run."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median wall-clock seconds of each side."""
    return {name: statistics.median(values) for name, values in rounds(sides, repeats, warm_up).items()}


def rounds(sides: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Wall-clock seconds of each side in each round; they take turns, so that what else the machine does hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + repeats):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


class Saved:
    """Bytes that autograd keeps between forward and backward, each storage once."""

    def __init__(self, besides: Iterable[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in besides}
        self.bytes = 0

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
            self._kept.append(tensor)  # or its place would be given to another tensor
        return tensor

    @contextmanager
    def watch(self) -> Iterator[None]:
        self._kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield
        self._kept.clear()


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())


def _processor() -> str:
    """Its model, and whether it multiplies tiles of bfloat16, which makes another machine of it."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    told = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    name = told.get("model name", platform.processor() or platform.machine()).strip()
    return f"{name}, AMX" if "amx_tile" in told.get("flags", "") else name


def save_grid(pictures: np.ndarray, path: Path) -> None:
    """Pictures (rows, columns, s, s, 3) uint8 side by side, as a PNG."""
    rows, columns, side = pictures.shape[:3]
    grid = pictures.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
    Image.fromarray(grid).save(path, optimize=True)


def record(name: str, result: Mapping[str, Any], seed: int, keep: bool) -> None:
    """Print the result as the last line; keep it under `benchmarks/results/` where that was asked for."""
    whole = {
        **result,
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "seed": seed,
        "device": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    if keep:
        (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(whole))
