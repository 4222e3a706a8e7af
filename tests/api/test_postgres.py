"""What PostgreSQL minds and SQLite does not: the same replies on both."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import select, text

from core.adapters.repository import AdapterRepository
from core.models import Job
from core.settings import Settings
from tests.api.conftest import Service, assert_problem, job_body, opened, upload

pytestmark = pytest.mark.stack


@pytest.fixture
def service(service_settings: Settings, postgres_url: str) -> Iterator[Service]:
    service_settings.database_url = SecretStr(postgres_url)
    with opened(service_settings) as service:
        yield service


def test_the_story_of_a_job(service: Service) -> None:
    owner = service.owner()
    job_id, adapter = service.trained(owner)
    job = owner.client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", adapter.model)
    events = owner.client.get(f"/v1/fine_tuning/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
    assert "The job has successfully completed" in events.text
    assert owner.client.get("/v1/models").json()["data"][1]["id"] == adapter.model
    assert service.open.get("/readyz").json()["checks"]["schema"]["status"] == "ok"
    assert 'difffit_jobs{status="succeeded"} 1.0' in service.open.get("/metrics").text


def test_lists_and_gauges_ask_what_it_can_answer(service: Service) -> None:
    owner = service.owner()
    _, adapter = service.trained(owner)
    owner.client.patch(f"/v1/adapters/{adapter.id}", json={"metadata": {"stage": "live"}})
    drawing = {"json": {"model": "tiny-dit"}, "headers": {"Prefer": "respond-async"}}
    asked = [owner.client.post("/v1/images/generations", **drawing).json()["id"] for _ in range(2)]
    for path, found in (
        ("adapters?metadata[stage]=live", [adapter.id]),
        ("adapters?metadata=null", []),
        ("fine_tuning/jobs?status=succeeded", [adapter.job_id]),
        ("fine_tuning/jobs?status=queued", []),
        ("images/generations", asked[::-1]),
        (f"images/generations?after={asked[1]}", [asked[0]]),
    ):
        assert [item["id"] for item in owner.client.get(f"/v1/{path}").json()["data"]] == found, path
    told = service.open.get("/metrics").text
    assert 'difffit_queue_depth{queue="sample"} 2.0' in told
    assert 'difffit_queue_oldest_seconds{queue="sample"} 0.0\n' not in told
    assert 'difffit_workers{queue="train"} 0.0' in told
    stale = owner.client.delete(f"/v1/models/{adapter.model}", headers={"If-Match": '"another"'})
    assert_problem(stale, 412, "precondition_failed")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/files/a%00b", 404),
        ("GET", f"/v1/models/{'x' * 5000}", 404),
        ("GET", "/v1/files?after=a%00b", 422),
        ("GET", "/v1/files?after=%ED%A0%80", 404),  # a surrogate's bytes: read as the replacement character
        ("GET", f"/v1/fine_tuning/jobs/ftjob-{'0' * 25}/metrics?after={2**31}", 422),
        ("GET", f"/v1/fine_tuning/jobs/ftjob-{'0' * 25}/events?after=ftevent-{10**17}", 404),
        ("DELETE", "/v1/api_keys/%F0%9F%92%A3", 404),
    ],
)
def test_hostile_ids_are_answered_and_never_a_fault(service: Service, method: str, path: str, status: int) -> None:
    assert service.owner().client.request(method, path).status_code == status


def test_the_largest_numbers_that_are_taken_can_be_kept(service: Service) -> None:
    owner = service.owner()
    file_id = service.dataset(owner).id
    job = owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id, seed=2**63 - 1))
    assert job.json()["seed"] == 2**63 - 1
    page = owner.client.get(f"/v1/fine_tuning/jobs/{job.json()['id']}/events", params={"after": "ftevent-" + "9" * 18})
    assert page.status_code == 200
    stream = {"Accept": "text/event-stream", "Last-Event-ID": "9" * 18}
    assert owner.client.post(f"/v1/fine_tuning/jobs/{job.json()['id']}/cancel").status_code == 200
    assert owner.client.get(f"/v1/fine_tuning/jobs/{job.json()['id']}/events", headers=stream).status_code == 200


def test_many_at_once_under_one_key_happen_once(service: Service) -> None:
    owner = service.owner()
    file_id = service.dataset(owner).id

    def ask(_: int) -> Any:
        return owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id), headers={"Idempotency-Key": "k1"})

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, range(24)))
    assert {reply.status_code for reply in replies} <= {200, 409}
    assert len({reply.json()["id"] for reply in replies if reply.status_code == 200}) == 1
    with service.database.read() as session:
        assert len(session.scalars(select(Job)).all()) == 1


def test_two_keys_that_revoke_each_other_leave_one(service: Service) -> None:
    owner = service.owner()
    made = owner.client.post("/v1/api_keys", json={"name": "second"}).json()
    second = service.client(made["secret"])
    pairs = [(owner.client, made["id"]), (second, owner.key_id)]
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda pair: pair[0].delete(f"/v1/api_keys/{pair[1]}"), pairs))
    assert sorted(reply.status_code for reply in replies) in ([200, 401], [200, 409])
    assert [client.get("/v1/models").status_code for client in (owner.client, second)].count(200) == 1


def test_an_upload_under_one_key_by_many_is_one_file(service: Service, tmp_path: Path) -> None:
    owner = service.owner()
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: upload(owner.client, **{"Idempotency-Key": "k1"}), range(8)))
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert len(service.objects()) == 1
    assert service.spooled() == []


def test_a_schema_that_is_not_migrated_yet_is_unavailable_and_not_an_error(service: Service) -> None:
    """The new release's API beside the old schema: while /readyz refuses, so do the routes."""
    owner = service.owner()
    file_id = service.dataset(owner).id
    with service.database.write() as session:
        session.execute(text("DELETE FROM alembic_version"))
        session.execute(text("ALTER TABLE jobs DROP COLUMN phase"))
        session.execute(text("DROP TABLE evaluations"))
    assert service.open.get("/readyz").json()["checks"]["schema"]["status"] == "failed"
    for reply in (
        owner.client.get("/v1/fine_tuning/jobs"),
        owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id)),
        owner.client.get("/v1/evaluations"),
        owner.client.delete(f"/v1/files/{file_id}"),
    ):
        assert_problem(reply, 503, "database_unavailable")
        assert int(reply.headers["retry-after"]) > 0
    assert owner.client.get("/v1/files").status_code == 200
    assert service.open.get("/metrics").status_code == 200


def test_a_statement_that_is_wrong_is_our_fault(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def list_newest(repository: AdapterRepository, *_: object) -> None:
        repository._session.execute(text("SELEC 1"))

    monkeypatch.setattr(AdapterRepository, "list_newest", list_newest)
    assert_problem(service.owner().client.get("/v1/adapters"), 500, "internal_error")


@pytest.mark.parametrize("table", ["tenants", "jobs"])
def test_a_lock_that_somebody_holds_is_answered_soon(service: Service, table: str) -> None:
    """Met by the key's look-up, or by the route."""
    owner = service.owner()
    with service.database.write() as holder:
        holder.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
        _assert_soon_unavailable(owner.client)
    assert owner.client.get("/v1/fine_tuning/jobs").status_code == 200


def test_a_pool_without_a_free_connection_is_answered_soon(service: Service) -> None:
    owner = service.owner()
    engine = service.app.state.database.engine
    with ExitStack() as held:
        for _ in range(20):
            held.enter_context(engine.connect())
        _assert_soon_unavailable(owner.client)
    assert owner.client.get("/v1/fine_tuning/jobs").status_code == 200


def test_the_api_waits_for_less_than_the_two_seconds_in_which_it_answers(service: Service) -> None:
    engine = service.app.state.database.engine
    with engine.connect() as connection:
        assert connection.execute(text("SHOW lock_timeout")).scalar_one() == "1500ms"
    assert engine.pool.timeout() == 1.5


def _assert_soon_unavailable(client: TestClient) -> None:
    """The wait itself is 1.5 s; the rest is for a machine that is busy."""
    started = time.monotonic()
    reply = client.get("/v1/fine_tuning/jobs")
    assert time.monotonic() - started < 10
    assert_problem(reply, 503, "database_unavailable")
    assert int(reply.headers["retry-after"]) > 0
