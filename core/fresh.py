"""Pictures that were just made, by digest, for some seconds in the broker's memory.

The object store has them all: this only saves those who wait for a picture a round trip to it.
"""

import hashlib
from typing import Any

import redis

from core.nudges import connect
from core.storage.base import ObjectStore

SECONDS = 10
MAX_BYTES = 256 * 1024  # a larger one takes its time anyway, and the broker's memory is for messages


class FreshObjects:
    """A broker that does not answer is no error: the store is asked instead."""

    def __init__(self, broker_url: str, store: ObjectStore) -> None:
        self._client: Any = connect(broker_url)
        self._store = store

    def keep(self, sha256: str, data: bytes) -> None:
        if len(data) > MAX_BYTES:
            return
        try:
            self._client.set(_name(sha256), data, ex=SECONDS)
        except (redis.RedisError, OSError):
            return

    def get(self, key: str, sha256: str) -> bytes:
        """The bytes of that digest, else those that the store has under `key`."""
        try:
            data: bytes | None = self._client.get(_name(sha256))
        except (redis.RedisError, OSError):
            data = None
        if data is not None and hashlib.sha256(data).hexdigest() == sha256:
            return data
        return self._store.get(key)

    def close(self) -> None:
        self._client.close()


def _name(sha256: str) -> str:
    return f"difffit.fresh:{sha256}"
