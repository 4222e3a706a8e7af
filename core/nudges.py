"""Redis publish/subscribe: "there is work", "this is done". A lost word costs a poll, never work."""

import threading
from collections.abc import Callable
from typing import Any

import redis

from core.settings import BadSettings

WORK = "difffit.work"  # said after a commit that promised a message; the relay and running pumps listen
DONE = "difffit.done"  # an id whose row has reached a terminal state; waiting callers listen
_NEWS = "/news"


def news_of(noun_id: str) -> str:
    """The word that something of it has changed, though it has not ended."""
    return f"{noun_id}{_NEWS}"


def id_of(word: str) -> str:
    return word.removesuffix(_NEWS)


_TIMEOUTS = {"socket_timeout": 5.0, "socket_connect_timeout": 2.0}


def connect(broker_url: str) -> "redis.Redis":
    """A client for a Celery broker URL; kombu writes Unix sockets as `redis+socket://`, redis-py as `unix://`."""
    if broker_url.startswith("redis+socket://"):
        broker_url = "unix://" + broker_url.removeprefix("redis+socket://")
    return redis.Redis.from_url(broker_url, **_TIMEOUTS)


def refuse_eviction(broker_url: str) -> None:
    """Raises BadSettings where the broker may drop messages that wait. One that does not answer is not judged."""
    try:
        with connect(broker_url) as client:
            policy = client.info("memory")["maxmemory_policy"]
    except (redis.RedisError, OSError, KeyError):
        return
    if policy.startswith("allkeys-"):  # `volatile-…` takes what has an end of its own: fresh pictures, never a queue
        raise BadSettings(
            f"the broker at DIFFFIT_BROKER_URL drops queued work when its memory is full (maxmemory-policy {policy}): "
            "set its maxmemory-policy to noeviction"
        )


class Nudges:
    """Says the words. A broker that does not answer is no error here: listeners poll as well."""

    def __init__(self, broker_url: str) -> None:
        self._client = connect(broker_url)

    def rouse(self) -> None:
        self._publish(WORK, "")

    def announce(self, noun_id: str) -> None:
        self._publish(DONE, noun_id)

    def ping(self) -> bool:
        try:
            return bool(self._client.ping())
        except redis.RedisError:
            return False

    def close(self) -> None:
        self._client.close()

    def _publish(self, channel: str, word: str) -> None:
        try:
            self._client.publish(channel, word)
        except (redis.RedisError, OSError):
            return


class Listener:
    """A thread that calls `heard(word)` for every word on a channel, and reconnects for as long as it lives."""

    def __init__(self, broker_url: str, channel: str, heard: Callable[[str], object]) -> None:
        self._client = connect(broker_url)
        self._channel = channel
        self._heard = heard
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"listen {channel}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=3)
        self._client.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except (redis.RedisError, OSError):
                self._closed.wait(0.5)

    def _listen(self) -> None:
        with self._client.pubsub(ignore_subscribe_messages=True) as subscription:
            subscription.subscribe(self._channel)
            while not self._closed.is_set():
                message: dict[str, Any] | None = subscription.get_message(timeout=1.0)
                if message is not None:
                    data = message["data"]
                    self._heard(data.decode() if isinstance(data, bytes) else str(data))
