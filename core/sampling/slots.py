"""Which adapter is where: on the device (hot), parsed in host memory (warm), or to be loaded (cold).

Loads run on a pool of their own; the bank is written by the thread that owns the device alone.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Literal

from core.diffusion.adapter import Adapter
from core.diffusion.bank import BASE_SLOT, AdapterBank

Residency = Literal["hot", "warm", "cold"]
LoadAdapter = Callable[[str], Adapter]


@dataclass(frozen=True)
class Seat:
    """A slot that a request holds, and how its adapter came to be there."""

    slot: int
    residency: Residency
    load_ms: float
    classes: int


class AdapterSlots:
    """Adapters by digest. A slot in use is never given to another; of the others the least recently used goes first."""

    def __init__(
        self,
        bank: AdapterBank,
        load_adapter: LoadAdapter,
        *,
        host_bytes: int = 1 << 30,
        threads: int = 2,
        wake: Event | None = None,
    ) -> None:
        self._bank = bank
        self._load_adapter = load_adapter
        self._host_bytes = host_bytes
        self._wake = wake or Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="adapter-load")
        self._loads: dict[str, Future[tuple[Adapter, float]]] = {}
        self._host: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
        self._host_used = 0  # bytes
        self._load_ms: dict[str, float] = {}  # of adapters that no request has used since they were loaded
        self._wanted: dict[str, int] = {}  # by how many waiting requests
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._users: dict[str, int] = {}
        self._free = list(range(bank.slots - 1, BASE_SLOT, -1))
        self._to_pin: list[str] = []

    def want(self, digest: str) -> Residency:
        """A request for this adapter arrives: begin to load it now, not when its turn comes."""
        self._wanted[digest] = self._wanted.get(digest, 0) + 1
        if digest in self._slot_of:
            return "hot"
        if digest in self._host:
            return "warm"
        if digest not in self._loads:
            self._start(digest)
        return "cold"

    def pin(self, digest: str) -> None:
        """Load an adapter and keep it in its slot for good."""
        self.want(digest)
        self._to_pin.append(digest)

    def unwant(self, digest: str) -> None:
        """A waiting request went away, or took its seat."""
        left = self._wanted[digest] - 1
        if left:
            self._wanted[digest] = left
        else:
            del self._wanted[digest]

    def poll(self) -> dict[str, Exception]:
        """Take in what has been loaded; the failures by digest. They are forgotten: the next request tries again."""
        failed: dict[str, Exception] = {}
        for digest in [digest for digest, load in self._loads.items() if load.done()]:
            load = self._loads.pop(digest)
            error = load.exception()
            if isinstance(error, Exception):
                failed[digest] = error
            elif error is not None:
                raise error
            else:
                self._host[digest], self._load_ms[digest] = load.result()
                self._host_used += self._bank.nbytes(self._host[digest])
        for digest in [digest for digest in self._to_pin if digest in failed or self.is_ready([digest])]:
            self._to_pin.remove(digest)
            if digest in failed:
                self.unwant(digest)
            else:
                self.seat(digest, "cold")  # nobody leaves this seat
        self._trim()
        return failed

    def is_hot(self, digest: str) -> bool:
        return digest in self._slot_of

    def is_ready(self, digests: Collection[str]) -> bool:
        """Whether all of them could be seated now; what was dropped while its request waited is loaded again."""
        missing = {digest for digest in digests if digest not in self._slot_of}
        absent = [digest for digest in missing if digest not in self._host]
        for digest in absent:
            if digest not in self._loads:
                self._start(digest)
        if absent:
            return False
        idle = sum(digest not in self._users and digest not in digests for digest in self._slot_of)
        return len(missing) <= len(self._free) + idle if missing else True

    def seat(self, digest: str, arrived: Residency) -> Seat:
        """Put the adapter into a slot unless it is there, and hold the slot until `leave`."""
        began = time.perf_counter()
        load_ms = 0.0
        if digest not in self._slot_of:
            adapter = self._host[digest]
            evicted = None if self._free else self._idle_or_raise()
            slot = self._free[-1] if evicted is None else self._slot_of[evicted]
            self._bank.load(slot, adapter)
            if evicted is None:
                self._free.pop()
            else:
                self._slot_of.pop(evicted)
            self._slot_of[digest] = slot
            load_ms = 1000 * (time.perf_counter() - began)
        if arrived == "cold":
            load_ms += self._load_ms.get(digest, 0.0)
        elif arrived == "hot" and load_ms:
            arrived = "warm"  # it was evicted while the request waited
        self._slot_of.move_to_end(digest)
        if digest in self._host:
            self._host.move_to_end(digest)
        self._users[digest] = self._users.get(digest, 0) + 1
        self.unwant(digest)
        slot = self._slot_of[digest]
        return Seat(slot, arrived, load_ms, self._bank.classes(slot))

    def leave(self, digest: str) -> None:
        """Give a seat back; the adapter stays in its slot until the slot is needed."""
        left = self._users[digest] - 1
        if left:
            self._users[digest] = left
        else:
            del self._users[digest]

    def classes(self, digest: str) -> int | None:
        """How many classes an adapter has, once that is known."""
        if digest in self._host:
            return len(self._host[digest].classes)
        return self._bank.classes(self._slot_of[digest]) if digest in self._slot_of else None

    @property
    def resident(self) -> list[str]:
        """Digests on the device, least recently used first."""
        return list(self._slot_of)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, digest: str) -> None:
        future = self._pool.submit(self._timed, digest)
        future.add_done_callback(lambda _: self._wake.set())
        self._loads[digest] = future

    def _timed(self, digest: str) -> tuple[Adapter, float]:
        began = time.perf_counter()
        adapter = self._load_adapter(digest)
        return adapter, 1000 * (time.perf_counter() - began)

    def _idle_or_raise(self) -> str:
        """The least recently used adapter that nobody uses, if possible one that nobody waits for either."""
        idle = [digest for digest in self._slot_of if digest not in self._users]
        assert idle, "seat() without is_ready()"
        return next((digest for digest in idle if digest not in self._wanted), idle[0])

    def _trim(self) -> None:
        """Keep host memory within its bound, but never drop what a request waits for."""
        if self._host_used <= self._host_bytes:
            return
        for digest in [digest for digest in self._host if digest not in self._wanted]:
            self._host_used -= self._bank.nbytes(self._host.pop(digest))
            self._load_ms.pop(digest, None)
            if self._host_used <= self._host_bytes:
                return
