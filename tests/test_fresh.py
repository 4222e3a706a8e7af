"""Pictures that were just made: the broker's memory saves a trip to the store, and is never trusted."""

import hashlib
from pathlib import Path

import pytest
import redis

from core.fresh import MAX_BYTES, SECONDS, FreshObjects
from core.storage.base import ObjectMissing
from core.storage.local import LocalStore
from tests.servers import Valkey

DATA = b"a picture"
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def fresh(valkey: Valkey, store: LocalStore) -> FreshObjects:
    redis.Redis.from_url(valkey.url).flushdb()
    return FreshObjects(valkey.url, store)


def test_what_was_just_made_needs_no_store(fresh: FreshObjects, valkey: Valkey):
    fresh.keep(DIGEST, DATA)
    assert fresh.get("key", DIGEST) == DATA
    [name] = redis.Redis.from_url(valkey.url).keys("difffit.fresh:*")
    assert 0 < redis.Redis.from_url(valkey.url).ttl(name) <= SECONDS


def test_what_is_no_longer_there_comes_from_the_store(fresh: FreshObjects, store: LocalStore):
    with pytest.raises(ObjectMissing):
        fresh.get("key", DIGEST)
    store.put("key", DATA)
    assert fresh.get("key", DIGEST) == DATA


def test_other_bytes_under_a_digest_are_not_believed(fresh: FreshObjects, store: LocalStore):
    store.put("key", DATA)
    fresh.keep(DIGEST, b"another picture")
    assert fresh.get("key", DIGEST) == DATA


def test_large_ones_stay_out_of_the_brokers_memory(fresh: FreshObjects, valkey: Valkey):
    fresh.keep(DIGEST, bytes(MAX_BYTES + 1))
    assert not redis.Redis.from_url(valkey.url).keys("difffit.fresh:*")


def test_a_broker_that_is_away_costs_nothing(store: LocalStore):
    store.put("key", DATA)
    fresh = FreshObjects("redis://127.0.0.1:1/0", store)
    fresh.keep(DIGEST, DATA)
    assert fresh.get("key", DIGEST) == DATA
