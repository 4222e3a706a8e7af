"""Which adapter is where: on the device (hot), parsed in host memory (warm), or to be loaded (cold).

Loads run on a pool of their own; the bank is written by the thread that owns the device alone.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Literal

import structlog

from core import faults
from core.diffusion.adapter import Adapter
from core.diffusion.bank import BASE_SLOT, AdapterBank
from core.errors import Unavailable

log = structlog.get_logger()

PIN_AGAIN_SECONDS = 10.0

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
        self._load_ms: dict[str, float] = {}  # what loading took, as long as they are in host memory
        self._wanted: dict[str, int] = {}  # by how many waiting requests
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._users: dict[str, int] = {}
        self._free = list(range(bank.slots - 1, BASE_SLOT, -1))
        self._to_pin: dict[str, float] = {}  # to when (monotonic seconds) a load that failed may begin again

    def want(self, digest: str) -> Residency:
        """A request for this adapter arrives: begin to load it now, not when its turn comes."""
        self._wanted[digest] = self._wanted.get(digest, 0) + 1
        if digest in self._slot_of:
            return "hot"
        if digest in self._host:
            return "warm"
        self._start(digest)
        return "cold"

    def pin(self, digest: str) -> None:
        """Load an adapter and keep it in its slot for good; while it cannot be had, that is tried again."""
        if digest not in self._to_pin:
            self.want(digest)
            self._to_pin[digest] = 0.0

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
        self._pin(failed)
        self._trim()
        return failed

    def is_loaded(self, digests: Collection[str]) -> bool:
        """Whether all of them are on the device or in host memory: then only slots in use can keep them waiting."""
        return all(digest in self._slot_of or digest in self._host for digest in digests)

    def is_ready(self, digests: Collection[str]) -> bool:
        """Whether all of them could be seated now."""
        if not self.is_loaded(digests):
            return False
        missing = sum(digest not in self._slot_of for digest in set(digests))
        idle = sum(digest not in self._users and digest not in digests for digest in self._slot_of)
        return not missing or missing <= len(self._free) + idle

    def seat_all(self, arrived: Mapping[str, Residency]) -> dict[str, Seat]:
        """Seats for all of a request's adapters or for none, by digest; `arrived` is where they were when it came."""
        seats: dict[str, Seat] = {}
        # Those that have a slot first: they are then in use, and no other can be given theirs.
        for digest in sorted(arrived, key=lambda digest: digest not in self._slot_of):
            try:
                seats[digest] = self.seat(digest, arrived[digest])
            except Exception:
                for seated in seats:
                    self.want(seated)  # as it was before
                    self.leave(seated)
                raise
        return seats

    def seat(self, digest: str, arrived: Residency) -> Seat:
        """Put the adapter into a slot unless it is there, and hold the slot until `leave`."""
        began = time.perf_counter()
        load_ms = 0.0
        if digest not in self._slot_of:
            if not self._free:
                self._evict()
            slot = self._free[-1]
            self._bank.load(slot, self._host[digest])  # where this fails the slot may be half written: it stays free
            faults.point("adapter_applied")
            self._free.pop()
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
        """Begin to load, unless that is under way."""
        if digest in self._loads:
            return
        future = self._pool.submit(self._timed, digest)
        future.add_done_callback(lambda _: self._wake.set())
        self._loads[digest] = future

    def _timed(self, digest: str) -> tuple[Adapter, float]:
        began = time.perf_counter()
        adapter = self._load_adapter(digest)
        return adapter, 1000 * (time.perf_counter() - began)

    def _evict(self) -> None:
        """Free the slot that was least recently used of those that nobody uses; if possible nobody waits for it."""
        idle = [digest for digest in self._slot_of if digest not in self._users]
        assert idle, "seat() without is_ready()"
        evicted = next((digest for digest in idle if digest not in self._wanted), idle[0])
        self._free.append(self._slot_of.pop(evicted))
        if evicted in self._wanted and evicted not in self._host:
            self._start(evicted)  # it was hot when its request came, so nothing was loaded for that

    def _pin(self, failed: Mapping[str, Exception]) -> None:
        """Seat what is to be pinned and has come. What cannot be had now is tried again, all else is given up."""
        for digest, again_at in list(self._to_pin.items()):
            try:
                if digest in failed:
                    raise failed[digest]
                if self.is_ready([digest]):
                    self.seat(digest, "cold")  # nobody leaves this seat
                    del self._to_pin[digest]
                elif not self.is_loaded([digest]) and time.monotonic() >= again_at:
                    self._start(digest)
            except Unavailable as error:
                self._to_pin[digest] = time.monotonic() + PIN_AGAIN_SECONDS
                log.warning("adapter.not_pinned", sha256=digest, error=str(error))
            except Exception as error:  # this will not get better; the others still have their slots
                del self._to_pin[digest]
                self.unwant(digest)
                log.error("adapter.not_pinned", sha256=digest, exc_info=error)

    def _trim(self) -> None:
        """Keep host memory within its bound, but never drop what a request waits for."""
        if self._host_used <= self._host_bytes:
            return
        for digest in [digest for digest in self._host if digest not in self._wanted]:
            self._host_used -= self._bank.nbytes(self._host.pop(digest))
            self._load_ms.pop(digest, None)
            if self._host_used <= self._host_bytes:
                return
