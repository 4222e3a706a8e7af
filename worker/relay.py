"""Turns outbox messages into Celery nudges."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from celery import Celery
from redis import RedisError

from core import nudges, outbox
from core.db.session import Database
from worker.app import QUEUES

log = structlog.get_logger()


class Relay:
    """Sends a nudge only where none waits: a pump takes all work that it finds, so one is enough."""

    def __init__(self, app: Celery, database: Database, broker_url: str) -> None:
        self._app = app
        self._database = database
        self._broker = nudges.connect(broker_url)

    def run_once(self) -> None:
        """Send what the outbox holds. A broker that is away costs a try, not a message."""
        with self._broker_may_be_away():
            outbox.relay(self._database, self.send)

    def nudge(self, topics: Iterable[str]) -> None:
        """Of work that waits, whatever became of its message."""
        with self._broker_may_be_away():
            for topic in topics:
                self.send(topic, {})

    @contextmanager
    def _broker_may_be_away(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError, *self._app.connection().connection_errors) as error:
            log.warning("relay.failed", error=type(error).__name__)

    def send(self, topic: str, _payload: dict[str, Any]) -> None:
        queue = QUEUES[topic]
        if self._broker.llen(queue) == 0:
            self._app.send_task(topic, queue=queue, retry=False)
