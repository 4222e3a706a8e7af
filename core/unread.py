"""Queued rows that this release cannot read, since a newer one wrote them: they wait for a worker that can."""

import time
from collections.abc import Callable
from typing import TypeVar

import structlog

log = structlog.get_logger()

T = TypeVar("T")

_UNREADABLE = (KeyError, TypeError, ValueError)  # what reading back a spec with other fields raises


class Unread:
    """Those of one kind that this process has met. It leaves each alone for a while, then looks, and logs, anew."""

    def __init__(self, kind: str, again_seconds: float = 600.0) -> None:
        self._kind = kind
        self._again = again_seconds
        self._until: dict[str, float] = {}

    def ids(self) -> list[str]:
        """To be left out of a look for work: however many there are, they stand in nobody's way."""
        moment = time.monotonic()
        self._until = {row_id: until for row_id, until in self._until.items() if until > moment}
        return list(self._until)

    def read(self, row_id: str, read: Callable[[], T]) -> T | None:
        """What `read` returns; None where it cannot, and the row is one of `ids` from now on."""
        try:
            return read()
        except _UNREADABLE as error:
            log.warning(f"{self._kind}.left_to_another_release", row_id=row_id, error=repr(error))
            self._until[row_id] = time.monotonic() + self._again
            return None
