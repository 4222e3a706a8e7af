"""`python -m worker.upkeep`: relays nudges, takes back lost work, removes what is past its time.

A plain loop and not Celery beat: neither a lost broker nor a busy worker can stop it. Any number may run.
"""

import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

import structlog
from sqlalchemy.orm import Session

from core import nudges, outbox, retention
from core.datasets import service as datasets
from core.db.session import Database
from core.evaluations import service as evaluations
from core.jobs import upkeep
from core.logs import configure_logs
from core.samples import service as samples
from core.settings import Settings, get_settings
from core.storage import open_store
from worker.app import app, check_broker
from worker.relay import Relay

log = structlog.get_logger()
_RELAY_SECONDS = 0.5
_RETENTION_SECONDS = 60.0
_STOP_SECONDS = 10.0  # for what retention has in hand; cut short, it is done at the next start
# A pump that runs has heard the same word and takes the work without a message: let it have the processor first. What
# else is promised meanwhile goes out in one look.
_GATHER_SECONDS = 0.015


class Upkeep:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = Database(settings.database)
        self._store = open_store(settings)
        self._orphans = retention.Orphans()
        self._relay = Relay(app, self._database, settings.broker)
        self._judges_from = 0.0

    def close(self) -> None:
        self._database.close()

    def relay(self) -> None:
        self._relay.run_once()

    def sweep(self) -> None:
        """Every unfinished row without a live lease is offered again, whatever became of its message.

        Not for a lease's time after the database was away: workers could not extend theirs, and live.
        """
        try:
            self._database.ping()
        except Exception:
            self._judges_from = time.monotonic() + self._settings.lease_seconds
            raise
        if time.monotonic() < self._judges_from:
            return
        sweeps = {
            "dataset.validate": datasets.sweep,
            "job.train": upkeep.sweep,
            "sample.draw": samples.sweep,
            "evaluation.measure": evaluations.sweep,
        }
        self._relay.nudge([topic for topic, sweep in sweeps.items() if self._is_waiting(topic, sweep)])

    def _is_waiting(self, topic: str, sweep: Callable[[Session, int], bool]) -> bool:
        """A transaction for each: rows of one kind that make trouble hold up no other."""
        try:
            with self._database.write() as session:
                return sweep(session, self._settings.max_attempts)
        except Exception:
            log.exception("upkeep.failed", chore="sweep", topic=topic)
            return False

    def retain(self) -> None:
        """Remove what is past its time: images, sent messages, replays, objects of deleted or dead rows."""
        keep = timedelta(hours=self._settings.retention_hours)
        with self._database.write() as session:
            outbox.forget_sent(session)
        keep_checkpoints = self._settings.keep_checkpoints
        removed = retention.sweep(self._database, self._store, self._orphans, keep, keep_checkpoints)
        if removed:
            log.info("retention.removed", objects=removed)

    def run(self, stopping: threading.Event, roused: threading.Event) -> None:
        """Until `stopping`, which whoever sets it says by `roused` as well."""
        settings = self._settings
        # Apart: a store that does not answer holds up nobody whose work was lost.
        retaining = threading.Thread(target=self._retain_until, args=(stopping,), name="retention", daemon=True)
        retaining.start()
        listener = nudges.Listener(settings.broker, nudges.WORK, lambda _: roused.set())
        due = {self.relay: 0.0, self.sweep: 0.0}
        every = {self.relay: _RELAY_SECONDS, self.sweep: settings.sweep_seconds}
        while not stopping.is_set():
            if roused.wait(_RELAY_SECONDS):
                stopping.wait(_GATHER_SECONDS)
                roused.clear()
                due[self.relay] = 0.0
            for chore in due:
                if time.monotonic() >= due[chore]:
                    _do(chore)
                    due[chore] = time.monotonic() + every[chore]
        listener.close()
        retaining.join(_STOP_SECONDS)

    def _retain_until(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            _do(self.retain)
            stopping.wait(_RETENTION_SECONDS)


def main() -> None:
    settings = get_settings()
    configure_logs(settings.log_level)
    check_broker(settings)
    upkeep = Upkeep(settings)
    stopping, roused = threading.Event(), threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()
        roused.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    upkeep.run(stopping, roused)
    upkeep.close()


def _do(chore: Callable[[], None]) -> None:
    """A chore that fails is tried again at its next turn: upkeep never ends by itself."""
    try:
        chore()
    except Exception:
        log.exception("upkeep.failed", chore=getattr(chore, "__name__", "?"))


if __name__ == "__main__":
    main()
