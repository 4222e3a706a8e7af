"""Who goes next: deficit round robin over tenants, with a bound on how long anyone is passed over.

Policy alone: no torch, no clock, no thread. Time is counted in rounds, which the engine ticks once a step.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

PATIENCE = 400  # rounds


@dataclass
class Waiting:
    """One request in the queue: the rows that it takes of a batch, and its whole work in rows times steps."""

    id: str
    tenant: str
    rows: int
    work: int
    since: int


@dataclass
class _Tenant:
    queue: "OrderedDict[str, Waiting]" = field(default_factory=OrderedDict)
    deficit: int = 0


class Batcher:
    """Each tenant in turn may start `quantum` of work a visit; what it does not use it keeps while it has requests.

    A request that has waited `patience` rounds and is loaded goes before all others, oldest first, and nothing else
    starts until it does: the batch drains until there are rows and slots for it, so nothing starves.
    """

    def __init__(self, quantum: int = 40, patience: int = PATIENCE) -> None:
        self._quantum = quantum
        self._patience = patience
        self._round = 0
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()  # in the order of their turns
        self._by_id: dict[str, Waiting] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._by_id)

    def tick(self) -> None:
        """A round has passed for all that wait."""
        self._round += 1

    def add(self, request_id: str, tenant: str, rows: int, work: int) -> None:
        """Queue a request behind its tenant's others."""
        if request_id in self._by_id:
            raise KeyError(f"request {request_id} waits already")
        waiting = Waiting(request_id, tenant, rows, work, self._round)
        self._by_id[request_id] = waiting
        self._tenants.setdefault(tenant, _Tenant()).queue[request_id] = waiting

    def remove(self, request_id: str) -> bool:
        """Forget a request; False if it does not wait here."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is None:
            return False
        tenant = self._tenants[waiting.tenant]
        del tenant.queue[request_id]
        if not tenant.queue:
            del self._tenants[waiting.tenant]  # its deficit goes too: idleness saves nothing up
        return True

    def next(self, room: int, is_ready: Callable[[str], bool], is_loaded: Callable[[str], bool]) -> str | None:
        """Take the request that starts now, of at most `room` rows; None if none may.

        `is_loaded` says that a request waits for nothing but the others, `is_ready` that it has not even to wait for
        the slots that they hold. What is still being loaded holds nobody up, however long it has waited.
        """
        overdue = self._overdue(is_loaded)
        if overdue is not None:
            return self._take(overdue) if overdue.rows <= room and is_ready(overdue.id) else None
        heads = self._heads(room, is_ready)
        if not heads:
            return None
        while True:
            name, tenant = next(iter(self._tenants.items()))
            head = heads.get(name)
            if head is not None and head.work <= tenant.deficit:
                return self._take(head)
            if head is not None:
                tenant.deficit += self._quantum
            self._tenants.move_to_end(name)

    def _overdue(self, is_loaded: Callable[[str], bool]) -> Waiting | None:
        """The oldest request that is loaded, if its patience is over."""
        for waiting in self._by_id.values():
            if self._round - waiting.since < self._patience:
                return None
            if is_loaded(waiting.id):
                return waiting
        return None

    def _heads(self, room: int, is_ready: Callable[[str], bool]) -> dict[str, Waiting]:
        """Each tenant's oldest request that is ready and fits."""
        heads: dict[str, Waiting] = {}
        for name, tenant in self._tenants.items():
            head = next(
                (waiting for waiting in tenant.queue.values() if waiting.rows <= room and is_ready(waiting.id)), None
            )
            if head is not None:
                heads[name] = head
        return heads

    def _take(self, waiting: Waiting) -> str:
        self._tenants[waiting.tenant].deficit -= waiting.work
        self.remove(waiting.id)
        return waiting.id
