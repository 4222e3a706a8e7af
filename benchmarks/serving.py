"""`python -m benchmarks.serving`: one trace of requests, served by this engine and by what diffusers offers.

Poisson arrivals, 64 adapters by Zipf's law, 8 tenants, step counts mixed, guidance on, every adapter in memory. Sides:

| side | what |
|---|---|
| mixed | this engine |
| unmixed | this engine, only rows of one adapter in a batch |
| by adapter | diffusers and PEFT, first come first served, batches of equal adapter and step count |
| hotswap | diffusers and PEFT, one request after the other, its LoRA swapped in |

The clock is a side's own CPU time, all its threads added up; between two arrivals of an idle side it jumps. The sides
take turns by their clocks, so that what else the machine does hits all of them alike. Saturation: the whole trace waits
at the start. Then the trace comes at 70 % of what `by adapter` serves so, which all sides but `hotswap` can bear, and
at 70 % of what `mixed` serves. `p99_vs_batch_by_adapter` is read at the lower of the two. Network, solver, guidance and
decoder are the same; float32 is what the service starts with, and the keys' values are its.
"""

import argparse
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from benchmarks import measure
from benchmarks.bases import SHIPPED, make_base, make_transformer
from benchmarks.mixed_batch import make_adapter
from benchmarks.peers import LoraPipeline
from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.catalog import read_json
from core.sampling.engine import Engine
from core.sampling.request import AdapterPart, SampleRequest
from core.sampling.row import Sampled
from core.settings import PACKAGED_BASE, Settings
from worker.runtime import CPU_ROWS, FEW_ROWS

SEED = 0
ADAPTERS, TENANTS, ZIPF = 64, 8, 1.0
STEPS = (5, 10, 20)
SCALE = 3.0
DTYPES = ("float32", "bfloat16")
SHARE = 0.7  # of saturation, where latency is read
CLASSES = 4


@dataclass(frozen=True)
class Asked:
    number: int
    at: float  # in units of the mean time between arrivals
    adapter: int
    label: int
    steps: int


def make_trace(count: int) -> list[Asked]:
    chance = np.random.default_rng(SEED)
    shares = 1 / np.arange(1, ADAPTERS + 1) ** ZIPF
    times = np.cumsum(chance.exponential(1.0, count))
    adapters = chance.choice(ADAPTERS, size=count, p=shares / shares.sum())
    labels, steps = chance.integers(CLASSES, size=count), chance.choice(STEPS, size=count)
    columns = (column.tolist() for column in (times, adapters, labels, steps))
    return [Asked(*row) for row in zip(range(count), *columns, strict=True)]


class Side(Protocol):
    def offer(self, asked: Asked) -> None: ...

    def work(self) -> list[int]:
        """One piece of work that cannot be interrupted; the numbers of the requests that it finished."""
        ...


class Unmixed(Engine):
    """A row joins only rows of its own adapter: good for throughput, and nobody here asks how long others wait."""

    def _is_ready(self, request_id: str) -> bool:
        under_way = {digest for row in self._active for digest in row.digests}
        return under_way <= set(self._waiting[request_id].digests) and super()._is_ready(request_id)

    def _is_loaded(self, request_id: str) -> bool:
        return self._is_ready(request_id)  # else who has waited long would empty the batch


class Ours:
    def __init__(self, base: Base, adapters: Sequence[Adapter], kind: type[Engine]) -> None:
        settings = Settings.model_fields
        self._engine = kind(
            base,
            base.widest_layout(),
            slots=settings["bank_slots"].default,
            max_rows=CPU_ROWS,
            few_rows=FEW_ROWS,
            load_adapter=lambda digest: adapters[int(digest)],
        )
        self._futures: dict[int, Future[Sampled]] = {}

    def offer(self, asked: Asked) -> None:
        self._futures[asked.number] = self._engine.submit(
            SampleRequest(
                id=str(asked.number),
                tenant=f"tenant-{asked.adapter % TENANTS}",
                seed=asked.number,
                adapters=(AdapterPart(str(asked.adapter), 1.0, asked.label),),
                steps=asked.steps,
                guidance="cfg",
                guidance_scale=SCALE,
            )
        )

    def work(self) -> list[int]:
        if not self._engine.step():
            self._engine.wait(0.01)  # a loading thread, which has its CPU time counted
        self._engine._decoder._pool.submit(int).result()  # so is the decoder, before the next side's turn
        ended = [number for number, future in self._futures.items() if future.done()]
        for number in ended:
            self._futures.pop(number).result()
        return ended

    def close(self) -> None:
        self._engine.close()


class Theirs:
    """First come, first served; `most` requests that agree in adapter and steps run together."""

    def __init__(self, pipeline: LoraPipeline, most: int) -> None:
        self._pipeline = pipeline
        self._most = most
        self._queue: deque[Asked] = deque()

    def offer(self, asked: Asked) -> None:
        self._queue.append(asked)

    def work(self) -> list[int]:
        head = self._queue[0]
        batch = [one for one in self._queue if (one.adapter, one.steps) == (head.adapter, head.steps)][: self._most]
        labels, seeds = [one.label for one in batch], [one.number for one in batch]
        self._pipeline.draw(head.adapter, labels, seeds, head.steps, SCALE)
        for one in batch:
            self._queue.remove(one)
        return seeds

    def close(self) -> None:
        self._queue.clear()


@dataclass
class Run:
    """A trace on a side, with a clock of its own."""

    side: Ours | Theirs
    trace: Sequence[Asked]
    gap: float  # seconds between two arrivals, on average; 0: all wait at the start
    clock: float = 0.0
    offered: int = 0
    latencies: list[float] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return len(self.latencies) == len(self.trace)

    def advance(self) -> None:
        if self.offered == len(self.latencies):  # idle
            self.clock = max(self.clock, self.gap * self.trace[self.offered].at)
        began = time.process_time()
        while self.offered < len(self.trace) and self.gap * self.trace[self.offered].at <= self.clock:
            self.side.offer(self.trace[self.offered])
            self.offered += 1
        ended = self.side.work()
        self.clock += time.process_time() - began
        self.latencies += [self.clock - self.gap * self.trace[number].at for number in ended]

    @property
    def per_second(self) -> float:
        return len(self.trace) / self.clock

    def latency(self, share: float) -> float:
        return float(np.percentile(self.latencies, share))


def serve(makers: dict[str, Callable[[], Ours | Theirs]], trace: Sequence[Asked], gap: float) -> dict[str, Run]:
    runs = {name: Run(make(), trace, gap) for name, make in makers.items()}
    while left := [run for run in runs.values() if not run.is_over]:
        min(left, key=lambda run: run.clock).advance()
    for run in runs.values():
        run.side.close()
    return runs


def measured(dtype: torch.dtype, trace: Sequence[Asked]) -> dict[str, object]:
    print(f"{dtype}, {len(trace)} requests", flush=True)
    base = make_base(SHIPPED, dtype)
    adapters = [make_adapter(base, number) for number in range(ADAPTERS)]
    scheduler = read_json(PACKAGED_BASE / "scheduler" / "scheduler_config.json")
    pipeline = LoraPipeline(base, make_transformer(SHIPPED), scheduler, ADAPTERS)
    makers: dict[str, Callable[[], Ours | Theirs]] = {
        "mixed": lambda: Ours(base, adapters, Engine),
        "unmixed": lambda: Ours(base, adapters, Unmixed),
        "by adapter": lambda: Theirs(pipeline, CPU_ROWS // 2),
        "hotswap": lambda: Theirs(pipeline, 1),
    }
    for make in makers.values():  # warm everything up
        serve({"": make}, trace[:3], 0.0)

    saturated = serve(makers, trace, 0.0)
    throughput = {name: run.per_second for name, run in saturated.items()}
    for name, value in throughput.items():
        print(f"{name:10} {value:6.2f} images/s at saturation", flush=True)
    found: dict[str, object] = {
        "throughput": {name: round(value, 3) for name, value in throughput.items()},
        "throughput_vs_hotswap": round(throughput["mixed"] / throughput["hotswap"], 3),
        "throughput_vs_unmixed": round(throughput["mixed"] / throughput["unmixed"], 3),
    }
    for whose, sides in (("by adapter", list(makers)), ("mixed", ["mixed", "by adapter"])):
        load = SHARE * throughput[whose]
        runs = serve({side: makers[side] for side in sides}, trace, 1 / load)
        table = {
            name: {"p50_s": round(run.latency(50), 3), "p99_s": round(run.latency(99), 3)} for name, run in runs.items()
        }
        print(f"at {load:.2f} images/s, 70 % of what {whose} serves at saturation:")
        for name, row in table.items():
            print(f"{name:10} p50 {row['p50_s']:7.2f} s  p99 {row['p99_s']:7.2f} s", flush=True)
        ratio = runs["mixed"].latency(99) / runs["by adapter"].latency(99)
        found[f"at_70_of_{whose.replace(' ', '_')}"] = {
            "images_per_second": round(load, 3),
            "latency": table,
            "p99_vs_batch_by_adapter": round(ratio, 3),
        }
        found.setdefault("p99_vs_batch_by_adapter", round(ratio, 3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 requests; keep nothing")
    parser.add_argument("--keep", action="store_true", help="with --quick: keep the result nevertheless")
    parser.add_argument("--requests", type=int, help="default: 300")
    args = parser.parse_args()
    torch.set_num_threads(1)

    trace = make_trace(args.requests or (50 if args.quick else 300))
    found = {name: measured(getattr(torch, name), trace) for name in DTYPES}
    keys = ("throughput_vs_hotswap", "throughput_vs_unmixed", "p99_vs_batch_by_adapter")
    result = {key: found[DTYPES[0]][key] for key in keys} | found | {"requests": len(trace)}
    measure.record("serving", result, SEED, args.keep or not args.quick)


if __name__ == "__main__":
    main()
