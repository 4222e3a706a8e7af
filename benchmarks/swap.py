"""`python -m benchmarks.swap`: what it takes to bring an adapter of DiT-XL/2 with 101 classes onto the device.

A thousand adapters in a local S3 server. Hot: it is in its slot. Warm: from host memory into a slot. Cold: from the
object store through the worker's own loader: bytes, digest, disk cache, parse; then the slot. Each load goes through
the engine's `AdapterSlots`, with the base out of the way: a base of one block holds XL/2's class rows and layout.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from pathlib import Path
from threading import Event

import numpy as np
import torch

from benchmarks import measure
from benchmarks.bases import SHAPES, make_base
from benchmarks.stack import object_store
from core.adapters import format as adapter_format
from core.diffusion.adapter import Adapter
from core.diffusion.bank import AdapterBank
from core.diffusion.base import Base
from core.sampling.slots import AdapterSlots
from core.storage.base import ObjectStore
from worker.adapter_cache import AdapterCache

SEED = 0
SIZE, CLASSES = "XL/2", 101
SLOTS = 64


def make_adapter(base: Base, number: int) -> Adapter:
    layout, chance = base.layout(), torch.Generator().manual_seed(SEED + number)
    theta = 0.02 * torch.randn(layout.size, generator=chance)
    delta = 0.02 * torch.randn(CLASSES + 1, layout.hidden, generator=chance)
    names = tuple(f"class-{label}" for label in range(CLASSES))
    return Adapter(layout, base.fingerprint, theta, delta, names, (None,) * CLASSES)


def fill(store: ObjectStore, base: Base, count: int) -> tuple[dict[str, str], int]:
    """Keys by digest, and the bytes of a file."""
    keys: dict[str, str] = {}
    size = 0
    for number in range(count):
        data = adapter_format.save(make_adapter(base, number))
        digest, size = hashlib.sha256(data).hexdigest(), len(data)
        keys[digest] = f"adapters/{digest}"
        store.put(keys[digest], data)
    return keys, size


class Device:
    """Slots on a bank as the engine drives them, without a network behind."""

    def __init__(self, base: Base, keys: dict[str, str], store: ObjectStore, cache: Path, host_bytes: int) -> None:
        self.bank = AdapterBank(base.layout(), base, SLOTS)
        self._cache = AdapterCache(cache, store)
        self._wake = Event()
        self._slots = AdapterSlots(
            self.bank,
            lambda digest: self._cache.load(digest, keys[digest], base.fingerprint),
            host_bytes=host_bytes,
            wake=self._wake,
        )

    def take(self, digest: str) -> tuple[str, float]:
        """Where it was, and the milliseconds until its row could be drawn."""
        began = time.perf_counter()
        where = self._slots.want(digest)
        while not self._slots.is_ready([digest]):
            self._wake.wait(1.0)
            self._wake.clear()
            if failed := self._slots.poll():
                raise failed[digest]
        self._slots.seat(digest, where)
        spent = 1000 * (time.perf_counter() - began)
        self._slots.leave(digest)
        return where, spent

    def close(self) -> None:
        self._slots.close()
        self._cache.close()


def spread(values: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(statistics.median(values), 3),
        "p99_ms": round(float(np.percentile(values, 99)), 3),
        "count": len(values),
    }


def measured(store: ObjectStore, base: Base, count: int) -> dict[str, object]:
    keys, size = fill(store, base, count)
    digests = list(keys)
    with tempfile.TemporaryDirectory() as cache:
        device = Device(base, keys, store, Path(cache), host_bytes=2**33)
        found: dict[str, list[float]] = {"cold": [], "warm": [], "hot": []}
        for digest in digests:
            where, spent = device.take(digest)
            found[where].append(spent)
        for digest in [*digests, *digests]:  # the slots hold the last few: every one was evicted in between
            where, spent = device.take(digest)
            found[where].append(spent)
        for digest in digests[-(SLOTS - 1) :] * 20:
            where, spent = device.take(digest)
            found[where].append(spent)
        device.close()
        cached = Device(base, keys, store, Path(cache), host_bytes=2**33)
        disk = [cached.take(digest)[1] for digest in digests]
        cached.close()
    resident = device.bank.nbytes(make_adapter(base, 0))
    rows = {where: spread(values) for where, values in found.items()} | {"disk": spread(disk)}
    for where, row in rows.items():
        print(f"{where:5} p50 {row['p50_ms']:8.3f} ms  p99 {row['p99_ms']:8.3f} ms  of {row['count']}", flush=True)
    print(f"file {size:,} bytes; resident {resident:,} bytes, {2**30 // resident} adapters per GiB")
    return {
        **{f"{where}_{name}": value for where, row in rows.items() for name, value in row.items()},
        "file_bytes": size,
        "resident_bytes": resident,
        "adapters_per_gib": 2**30 // resident,
        "adapters": count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 adapters; keep nothing")
    parser.add_argument("--keep", action="store_true", help="with --quick: keep the result nevertheless")
    parser.add_argument("--adapters", type=int, help="default: 1,000")
    args = parser.parse_args()
    torch.set_num_threads(1)

    base = make_base(SIZE, torch.bfloat16)
    assert base.hidden == SHAPES[SIZE][1]
    with object_store() as store:
        result = measured(store, base, args.adapters or (100 if args.quick else 1_000))
    measure.record("swap", result, SEED, args.keep or not args.quick)


if __name__ == "__main__":
    main()
