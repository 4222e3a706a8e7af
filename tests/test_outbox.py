from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from core import outbox
from core.db.session import Database, now
from core.models import OutboxMessage
from tests.races import race


def put(database: Database, count: int) -> list[str]:
    names = [str(number) for number in range(count)]
    with database.write() as session:
        for name in names:
            outbox.put(session, "job.train", job_id=name)
    return names


class Sent:
    """A broker that keeps what it was given, and breaks where it is told to."""

    def __init__(self, breaks_at: str | None = None) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self._breaks_at = breaks_at

    def __call__(self, topic: str, payload: dict[str, Any]) -> None:
        if payload["job_id"] == self._breaks_at:
            raise ConnectionError("no broker")
        self.messages.append((topic, payload))

    @property
    def ids(self) -> list[str]:
        return [payload["job_id"] for _, payload in self.messages]


def test_a_promise_is_kept_only_if_its_transaction_commits(database: Database) -> None:
    sent = Sent()

    def promise_and_raise() -> None:
        with database.write() as session:
            outbox.put(session, "job.train", job_id="never")
            raise KeyError

    with pytest.raises(KeyError):
        promise_and_raise()
    assert outbox.relay(database, sent) == 0
    with database.write() as session:
        outbox.put(session, "sample.draw", job_id="kept")
        assert session.info[outbox.NUDGES]
    assert outbox.relay(database, sent) == 1
    assert sent.messages == [("sample.draw", {"job_id": "kept"})]


def test_messages_go_oldest_first_and_once(database: Database) -> None:
    names, sent = put(database, 7), Sent()
    assert [outbox.relay(database, sent, limit=3) for _ in range(4)] == [3, 3, 1, 0]
    assert sent.ids == names


def test_a_broker_that_fails_midway_loses_nothing(database: Database) -> None:
    names, broken, sent = put(database, 5), Sent(breaks_at="2"), Sent()
    with pytest.raises(ConnectionError):
        outbox.relay(database, broken)
    assert broken.ids == names[:2]
    assert outbox.relay(database, sent) == 3
    assert sent.ids == names[2:]


def test_a_relay_that_died_between_claim_and_mark_is_repeated_by_another(database: Database) -> None:
    put(database, 1)
    sent = Sent()
    with database.write() as session:
        session.scalars(select(OutboxMessage)).one().claimed_at = now(session)
    assert outbox.relay(database, sent) == 0
    with database.write() as session:
        session.scalars(select(OutboxMessage)).one().claimed_at = now(session) - timedelta(minutes=1)
    assert outbox.relay(database, sent) == 1


def test_relays_at_once_share_the_messages(database: Database) -> None:
    names, sent = put(database, 40), Sent()

    def relay() -> int:
        return sum(outbox.relay(database, sent, limit=5) for _ in range(40))

    assert sum(race(relay, relay, relay)) == 40
    assert sorted(sent.ids, key=int) == names


def test_the_database_is_not_held_while_the_broker_is_asked(database: Database) -> None:
    put(database, 1)

    def send(topic: str, payload: dict[str, Any]) -> None:
        with database.write() as session:  # would wait for ever on SQLite, were the relay's transaction open
            outbox.put(session, "dataset.validate", dataset_id=payload["job_id"])

    assert outbox.relay(database, send, limit=1) == 1
    with database.read() as session:
        assert len(session.scalars(select(OutboxMessage)).all()) == 2


def test_sent_messages_are_forgotten_and_waiting_ones_are_not(database: Database) -> None:
    put(database, 2)
    outbox.relay(database, Sent(), limit=1)
    with database.write() as session:
        outbox.forget_sent(session)
        assert len(session.scalars(select(OutboxMessage)).all()) == 2
        outbox.forget_sent(session, keep=timedelta(seconds=-1))
        assert [row.payload for row in session.scalars(select(OutboxMessage))] == [{"job_id": "1"}]
