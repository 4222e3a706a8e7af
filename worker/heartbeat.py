"""Keeps leases alive from a thread, for as long as the work moves."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog

from core import faults

log = structlog.get_logger()


class Heartbeat:
    """Calls `beat` every `seconds` until the block ends. A beat that fails is tried again at the next."""

    def __init__(self, beat: Callable[[], None], seconds: float) -> None:
        self._beat = beat
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self._beat()
                faults.point("heartbeat")
            except Exception:
                log.exception("heartbeat.failed")
