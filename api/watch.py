"""Waiting for image requests: one listener and one poll for all who wait, whatever their number."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from anyio import to_thread
from sqlalchemy.exc import SQLAlchemyError

from core import nudges
from core.db.session import Database
from core.samples import service as samples

_POLL_SECONDS = 0.1


class Watch:
    """The broker's word makes it quick; the poll makes it certain."""

    def __init__(self, database: Database, broker_url: str) -> None:
        self._database = database
        self._broker_url = broker_url
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._some = asyncio.Event()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()

        def heard(word: str) -> None:
            with suppress(RuntimeError):  # the loop is closing
                loop.call_soon_threadsafe(self._settled, [word])

        self._listener = nudges.Listener(self._broker_url, nudges.DONE, heard)
        self._task = asyncio.create_task(self._poll())

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await to_thread.run_sync(self._listener.close)

    async def wait(self, word: str, seconds: float) -> bool:
        """Whether the request of that id has come to its end in time. The row says how.

        `nudges.news_of(id)` waits for whatever happens to it: a picture on its way, or the end.
        """
        event = asyncio.Event()
        self._waiting.setdefault(word, set()).add(event)
        self._some.set()
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            return False
        finally:
            others = self._waiting.get(word, set())
            others.discard(event)
            if not others:
                self._waiting.pop(word, None)
        return True

    def _settled(self, words: Iterable[str]) -> None:
        for word in words:
            for event in (*self._waiting.get(word, ()), *self._waiting.get(nudges.news_of(word), ())):
                event.set()

    async def _poll(self) -> None:
        while True:
            if not self._waiting:
                self._some.clear()
                await self._some.wait()
            with suppress(SQLAlchemyError):  # a database that is away now may be back before the deadline
                self._settled(await to_thread.run_sync(self._ended, [nudges.id_of(word) for word in self._waiting]))
            await asyncio.sleep(_POLL_SECONDS)

    def _ended(self, sample_ids: list[str]) -> list[str]:
        with self._database.read() as session:
            return samples.list_ended(session, sample_ids)
