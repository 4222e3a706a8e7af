"""What the API process holds, and the thread that says that there is work."""

import threading
from dataclasses import dataclass

from api.metrics import Metrics
from api.watch import Watch
from core.bases import Catalog
from core.db.session import Database
from core.fresh import FreshObjects
from core.nudges import Nudges
from core.settings import Settings
from core.storage.base import ObjectStore


class Rouser:
    """Says `work` from a thread of its own: a broker that hangs delays nobody, and many words become one."""

    def __init__(self, nudges: Nudges) -> None:
        self._nudges = nudges
        self._wanted = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rouser", daemon=True)
        self._thread.start()

    def rouse(self) -> None:
        self._wanted.set()

    def close(self) -> None:
        self._closed = True
        self._wanted.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            self._nudges.rouse()
            if self._closed:
                return


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    store: ObjectStore
    catalog: Catalog
    nudges: Nudges
    fresh: FreshObjects
    rouser: Rouser
    watch: Watch
    metrics: Metrics
