"""How much of a kind each tenant may have under way at once, in this process."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import OverQuota

_RETRY_SECONDS = 5


class Gate:
    """`kind` is what is counted, for the refusal."""

    def __init__(self, most: int, kind: str, *, code: str) -> None:
        self._most = most
        self._kind = kind
        self._code = code
        self._under_way: Counter[str] = Counter()
        self._lock = threading.Lock()  # routes that block enter from threads

    @contextmanager
    def one(self, tenant_id: str) -> Iterator[None]:
        """Raises OverQuota where the tenant has as many as it may."""
        with self._lock:
            if self._under_way[tenant_id] >= self._most:
                raise OverQuota(
                    f"{self._most} {self._kind} are under way: let one end first",
                    code=self._code,
                    retry_after_seconds=_RETRY_SECONDS,
                )
            self._under_way[tenant_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[tenant_id] -= 1
                self._under_way += Counter()  # forget who has none
