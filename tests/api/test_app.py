"""The process as a whole: its start, its end of transactions, its health, what it does without its neighbours."""

import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.app import create_app
from api.metrics import release
from core import faults
from core.clock import utc_now
from core.datasets import service as datasets
from core.db.session import Database
from core.models import Dataset, Job, OutboxMessage
from core.settings import Settings
from core.storage.base import StorageUnavailable
from core.storage.local import LocalStore
from tests import rows
from tests.api.conftest import Owner, Service, assert_problem, job_body, upload

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("method", ["create", "cancel"])
def test_a_commit_that_fails_is_never_answered_with_success(service: Service, owner: Owner, method: str) -> None:
    file_id = service.dataset(owner).id
    job_id = owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()["id"]

    def fail(session: Session) -> None:
        if session.new or session.dirty or session.info.get("nudges") or method == "cancel":
            raise OperationalError("COMMIT", {}, Exception("disk I/O error"))

    event.listen(Session, "before_commit", fail)
    try:
        if method == "create":
            reply = owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id))
        else:
            reply = owner.client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    finally:
        event.remove(Session, "before_commit", fail)
    assert_problem(reply, 503, "database_unavailable")
    assert int(reply.headers["retry-after"]) > 0
    with service.database.read() as session:
        assert [(job.id, job.status) for job in session.scalars(select(Job))] == [(job_id, "queued")]


def test_the_commit_stands_before_the_reply(service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails after the commit fails the reply, and the row is there all the same."""
    file_id = service.dataset(owner).id
    faults._passed.clear()
    monkeypatch.setenv("FAULT", "after_commit_before_publish:raise")
    key = {"Idempotency-Key": "k1"}
    assert owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id), headers=key).status_code == 500
    monkeypatch.delenv("FAULT")
    with service.database.read() as session:
        job_id = session.scalars(select(Job.id)).one()
        assert "job.train" in session.scalars(select(OutboxMessage.topic)).all()
    again = owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id), headers=key)
    assert again.json()["id"] == job_id


def test_without_a_broker_everything_is_taken_and_nothing_lost(service: Service, owner: Owner) -> None:
    ready = service.open.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert ready.json()["checks"]["broker"]["status"] == "failed"
    file_id = service.dataset(owner).id
    assert upload(owner.client).status_code == 200
    assert owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).status_code == 200
    with service.database.read() as session:
        unsent = session.scalars(select(OutboxMessage).where(OutboxMessage.sent_at.is_(None))).all()
    assert {message.topic for message in unsent} == {"dataset.validate", "job.train"}


def test_readiness_needs_database_schema_and_store(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = service.open.get("/readyz").json()["checks"]
    assert {name: check["status"] for name, check in checks.items()} == {
        "database": "ok",
        "schema": "ok",
        "object_store": "ok",
        "broker": "failed",
        "bases": "ok",
    }

    def schema() -> tuple[int, str]:
        reply = service.open.get("/readyz")
        return reply.status_code, reply.json()["checks"]["schema"]["status"]

    with service.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert schema() == (200, "ok"), "a newer release has migrated; this one serves on until it is replaced"
    with service.database.write() as session:
        session.execute(text("DELETE FROM alembic_version"))
    assert schema() == (503, "failed")

    def away(_: LocalStore) -> None:
        raise StorageUnavailable("cannot write to the object folder")

    monkeypatch.setattr(LocalStore, "ping", away)
    assert service.open.get("/readyz").json()["checks"]["object_store"]["status"] == "failed"


def test_a_database_that_is_away_is_unavailable_and_not_an_error(service: Service, client: TestClient) -> None:
    def refuse(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("server closed the connection at 10.0.0.1"))

    engine = service.app.state.database.engine
    event.listen(engine, "before_cursor_execute", refuse)
    try:
        replies = [client.get("/v1/files"), upload(client), client.get("/v1/models")]
        ready = service.open.get("/readyz")
        metrics = service.open.get("/metrics")
        alive = service.open.get("/healthz")
    finally:
        event.remove(engine, "before_cursor_execute", refuse)
    for reply in replies:
        assert_problem(reply, 503, "database_unavailable")
        assert "10.0.0.1" not in reply.text
    assert (ready.status_code, alive.status_code) == (503, 200)
    assert "10.0.0.1" not in ready.text
    assert "difffit_database_up 0.0" in metrics.text


def test_a_base_that_cannot_be_read_is_the_services_trouble(service_settings: Settings, tmp_path: Path) -> None:
    service_settings.bases = [str(tmp_path / "nowhere")]
    with TestClient(create_app(service_settings), raise_server_exceptions=False) as client:
        database = Database(service_settings.database)
        owner = Service(client.app, service_settings, database, None, None, client).owner()  # pyright: ignore[reportArgumentType]
        reply = owner.client.get("/v1/models")
        database.close()
        assert_problem(reply, 503, "base_unavailable")
        assert str(tmp_path) not in reply.text
        assert client.get("/readyz").json()["status"] == "degraded"


def test_what_nobody_expected_tells_nothing_of_the_inside(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("core.adapters.repository.AdapterRepository.list_newest", burst)
    reply = client.get("/v1/adapters")
    assert_problem(reply, 500, "internal_error")
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"]


def test_metrics_count_requests_by_template_and_rows_by_status(service: Service, owner: Owner) -> None:
    file_id = service.dataset(owner).id
    job_id = owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()["id"]
    owner.client.get(f"/v1/fine_tuning/jobs/{job_id}")
    owner.client.get("/nowhere")
    told = service.open.get("/metrics").text
    assert 'difffit_jobs{status="queued"} 1.0' in told
    assert 'difffit_queue_depth{queue="train"} 1.0' in told
    route = 'route="/v1/fine_tuning/jobs/{job_id}",status="200"'
    assert re.search(rf'difffit_http_requests_total\{{method="GET",{re.escape(route)}\}} 1\.0', told)
    assert 'route="unmatched",status="404"' in told
    assert job_id not in told


def test_metrics_say_how_long_the_oldest_has_waited_and_who_works(service: Service, owner: Owner) -> None:
    job_id = owner.client.post("/v1/fine_tuning/jobs", json=job_body(service.dataset(owner).id)).json()["id"]
    waiting = [service.dataset(owner, "uploaded").id for _ in range(2)]
    long_ago = utc_now() - timedelta(hours=2)
    with service.database.write() as session:
        session.get_one(Dataset, waiting[0]).created_at = long_ago
        session.get_one(Job, job_id).created_at = long_ago  # it has had slices since
    told = measured(service)
    assert told['difffit_queue_depth{queue="datasets"}'] == 2
    assert 7200 <= told['difffit_queue_oldest_seconds{queue="datasets"}'] < 7300
    assert 0 <= told['difffit_queue_oldest_seconds{queue="train"}'] < 100
    assert (told['difffit_queue_oldest_seconds{queue="sample"}'], told['difffit_workers{queue="train"}']) == (0, 0)
    with service.database.write() as session:
        assert datasets.claim(session, rows.WORKER, rows.LEASE)
        assert datasets.claim(session, rows.WORKER, rows.LEASE)
        rows.claim_job(session, service.catalog)
    told = measured(service)
    assert (told['difffit_queue_depth{queue="datasets"}'], told['difffit_workers{queue="datasets"}']) == (0, 1)
    assert told['difffit_workers{queue="train"}'] == 1
    with service.database.write() as session:
        rows.expire(session, Job, job_id)
    assert measured(service)['difffit_workers{queue="train"}'] == 0
    assert told[f'difffit_build_info{{version="{release()}"}}'] == 1


def measured(service: Service) -> dict[str, float]:
    """The samples of `/metrics` by their names and labels."""
    lines = service.open.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_the_api_serves_without_torch(service_settings: Settings, sqlite_template: Path) -> None:
    """A process in which importing torch, diffusers or safetensors fails at once."""
    code = textwrap.dedent("""
        import sys
        from importlib.abc import MetaPathFinder

        class Blocked(MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "diffusers", "safetensors"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocked())
        import runpy
        runpy.run_module("api", run_name="__main__", alter_sys=True)
    """)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "DIFFFIT_DATA_DIR": str(service_settings.data_dir),
        "DIFFFIT_BASES": ",".join(service_settings.bases),
    }
    process = subprocess.Popen([sys.executable, "-c", code, "--port", str(port)], cwd=REPOSITORY, env=environment)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, "it ended"
            assert time.monotonic() < deadline
            try:
                reply = httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        assert reply.json() == {"status": "ok", "version": release()}
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").json()["checks"]["bases"]["status"] == "ok"
    finally:
        process.terminate()
        process.wait(10)
