"""PostgreSQL and the broker killed and started again while requests come in (FAULTS 13 and 18): nothing accepted is
lost, nothing is done twice, and whoever is refused is told to come again."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select

from core.db import migrate
from core.models import Job, OutboxMessage
from core.settings import Settings
from tests.api.conftest import Owner, Service, job_body, opened
from tests.servers import Postgres, Server, Valkey

pytestmark = pytest.mark.stack

CALLERS, EACH = 4, 20


def submitted(owner: Owner, file_id: str, server: Server) -> tuple[dict[str, str], Counter[int]]:
    """Jobs asked for by several callers while `server` is killed, away for a moment and started, again and again.

    The job that each key was answered with, and how often each status was given. A 503 or a 409 is asked again.
    """
    jobs: dict[str, str] = {}
    statuses: Counter[int] = Counter()

    def call(caller: int) -> None:
        number = 0
        while number < EACH:
            key = f"{caller}-{number}"
            reply = owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id), headers={"Idempotency-Key": key})
            statuses[reply.status_code] += 1
            if reply.status_code == 200:
                jobs[key] = reply.json()["id"]
                number += 1
            else:
                assert reply.status_code in (409, 503), reply.text
                assert int(reply.headers["retry-after"]) > 0
            time.sleep(0.05)  # sooner than a refusal says, so that more tries meet a restart

    with ThreadPoolExecutor(CALLERS) as pool:
        calls = [pool.submit(call, caller) for caller in range(CALLERS)]
        # From this thread: a server dies with the thread that started it (tests.servers).
        while not all(one.done() for one in calls):
            server.kill()
            time.sleep(0.1)
            server.start()
            time.sleep(0.3)
        for one in calls:
            one.result()
    return jobs, statuses


def jobs_in(service: Service) -> set[str]:
    """All of them; each has promised its message."""
    with service.database.read() as session:
        jobs = set(session.scalars(select(Job.id)))
        promised = select(func.count()).select_from(OutboxMessage).where(OutboxMessage.topic == "job.train")
        assert session.scalar(promised) == len(jobs)
    return jobs


def test_a_database_that_is_killed_again_and_again(service_settings: Settings) -> None:
    with Postgres.running() as postgres:
        service_settings.database_url = SecretStr(postgres.create_database())
        migrate.upgrade(service_settings.database)
        with opened(service_settings) as service:
            owner = service.owner()
            file_id = service.dataset(owner).id
            jobs, statuses = submitted(owner, file_id, postgres)
            assert statuses[503] > 0, "no request met a restart"
            assert (len(jobs), jobs_in(service)) == (CALLERS * EACH, set(jobs.values())), statuses


def test_a_broker_that_is_killed_again_and_again_is_not_noticed(service_settings: Settings) -> None:
    with Valkey.running() as broker:
        service_settings.broker_url = SecretStr(broker.url)
        with opened(service_settings) as service:
            owner = service.owner()
            file_id = service.dataset(owner).id
            jobs, statuses = submitted(owner, file_id, broker)
            assert set(statuses) == {200}
            assert (len(jobs), jobs_in(service)) == (CALLERS * EACH, set(jobs.values()))
