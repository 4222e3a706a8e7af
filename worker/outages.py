"""What a worker depends on is away for a while: it waits for the database, and after an outage for its next claim."""

import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.orm import Session

from core.db.session import DATABASE_AWAY, Database
from core.errors import Unavailable

log = structlog.get_logger()

_FIRST_WAIT = 0.05
_LONGEST_WAIT = 2.0

T = TypeVar("T")


class DatabaseUnavailable(Unavailable):
    code = "database_unavailable"


class Transactions:
    """Each is tried again for `patience_seconds`, which is a lease: whoever waits longer has lost what it holds.

    A commit whose answer was lost is tried again too: what a worker writes carries its attempt, and writing it twice
    changes nothing. `moved` is told before each try, for to wait is not to hang.
    """

    def __init__(self, database: Database, patience_seconds: float, moved: Callable[[], None]) -> None:
        self._database = database
        self._patience = patience_seconds
        self._moved = moved

    def write(self, action: Callable[[Session], T]) -> T:
        """What `action` returns, committed. Raises DatabaseUnavailable."""

        def once() -> T:
            with self._database.write() as session:
                return action(session)

        return self._outlasting(once)

    def write_last(self, *actions: Callable[[Session], object]) -> None:
        """What ends an attempt, in one transaction. Where the database stays away, its lease brings the work back."""

        def all_of_them(session: Session) -> None:
            for action in actions:
                action(session)

        try:
            self.write(all_of_them)
        except DatabaseUnavailable:
            log.warning("attempt.left_to_its_lease")

    def read(self, action: Callable[[Session], T]) -> T:
        """Raises DatabaseUnavailable."""

        def once() -> T:
            with self._database.read() as session:
                return action(session)

        return self._outlasting(once)

    def _outlasting(self, once: Callable[[], T]) -> T:
        until, wait = time.monotonic() + self._patience, _FIRST_WAIT
        while True:
            self._moved()
            try:
                return once()
            except DATABASE_AWAY as error:
                if time.monotonic() + wait > until:
                    raise DatabaseUnavailable("the database does not answer") from error
                log.warning("database.awaited", error=type(error).__name__, seconds=wait)
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)


class Rest:
    """A worker that had to hand something back claims nothing of its kind for a while: it would fare no better.

    Twice as long each time, until one has what it needs. May be told from any thread; what else meets the same outage
    while it rests makes it no longer.
    """

    def __init__(self, first_seconds: float = 1.0, longest_seconds: float = 60.0) -> None:
        self._first, self._longest = first_seconds, longest_seconds
        self._seconds = 0.0
        self._until = 0.0

    @property
    def is_on(self) -> bool:
        return time.monotonic() < self._until

    def begin(self) -> None:
        if self.is_on:
            return
        self._seconds = min(max(2 * self._seconds, self._first), self._longest)
        self._until = time.monotonic() + self._seconds

    def end(self) -> None:
        self._seconds = self._until = 0.0


class Patience:
    """With a store that refuses what a job has made: when to ask again, and whether to wait for it any longer."""

    def __init__(self, again_seconds: float = 2.0, longest_seconds: float = 600.0) -> None:
        self._again, self._longest = again_seconds, longest_seconds
        self._since: float | None = None
        self._asked_at = 0.0

    @property
    def is_due(self) -> bool:
        return self._since is None or time.monotonic() - self._asked_at >= self._again

    @property
    def is_left(self) -> bool:
        return self._since is None or time.monotonic() - self._since < self._longest

    def refused(self) -> None:
        self._asked_at = time.monotonic()
        self._since = self._since or self._asked_at

    def answered(self) -> None:
        self._since = None
