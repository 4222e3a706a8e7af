"""How often a tenant may ask, and how many streams it may have open."""

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import structlog
from fastapi.testclient import TestClient
from openai import OpenAI
from sqlalchemy import select
from starlette.types import Receive

from api.app import create_app
from api.gate import Gate
from api.middleware import OPEN_PATHS
from api.rates import WINDOW_SECONDS, Buckets
from core.errors import OverQuota
from core.models import Sample
from tests.api.conftest import Owner, Service, assert_problem, job_body, upload
from tests.api.serving import running, wait_until

IMAGE = {"model": "tiny-dit", "stream": True}


@dataclass
class Clock:
    now: float = 12345.678

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limit(service: Service, quota: int, clock: Clock) -> None:
    service.app.state.buckets = Buckets(quota, clock=clock)


def left(reply: Any) -> tuple[int, int]:
    """Remaining and reset, of a reply's RateLimit field."""
    found = re.fullmatch(r'"default";r=([0-9]+);t=([0-9]+)', reply.headers["ratelimit"])
    assert found, reply.headers["ratelimit"]
    return int(found[1]), int(found[2])


def test_a_burst_over_twenty_keys_is_one_tenants_and_nobody_elses(service: Service, clock: Clock) -> None:
    owner, other = service.owner(), service.owner()
    secrets = [owner.client.post("/v1/api_keys", json={"name": str(n)}).json()["secret"] for n in range(20)]
    clients = [service.client(secret) for secret in secrets]
    limit(service, 30, clock)
    replies = [client.get("/v1/models") for _ in range(2) for client in clients]
    assert [reply.status_code for reply in replies] == [200] * 30 + [429] * 10
    problem = assert_problem(replies[-1], 429, "rate_limited")
    assert problem["error"]["type"] == "rate_limit_error"
    assert problem["detail"] == "a tenant may send 30 requests a minute, all of its keys together: try again in 2 s"
    assert replies[-1].headers["retry-after"] == "2"
    assert other.client.get("/v1/models").status_code == 200


def test_after_the_time_that_it_names_a_request_is_taken_again(
    service: Service, client: TestClient, clock: Clock
) -> None:
    limit(service, 30, clock)
    replies = [client.get("/v1/models") for _ in range(40)]
    assert replies[-1].status_code == 429
    clock.advance(1.9)
    assert client.get("/v1/models").headers["retry-after"] == "1"
    clock.advance(0.2)
    assert [client.get("/v1/models").status_code for _ in range(2)] == [200, 429]
    clock.advance(WINDOW_SECONDS)
    assert [client.get("/v1/models").status_code for _ in range(31)] == [200] * 30 + [429]


def test_every_reply_to_a_live_key_says_what_is_left(
    service: Service, client: TestClient, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object) -> None:
        raise RuntimeError("nobody expected it")

    monkeypatch.setattr("core.adapters.repository.AdapterRepository.list_newest", burst)
    limit(service, 6, clock)
    replies = [
        client.get("/v1/models"),
        client.get("/nowhere"),
        client.post("/v1/fine_tuning/jobs", json={}),
        client.post("/v1/files", content=b"x", headers={"Content-Encoding": "gzip"}),
        client.get("/v1/adapters"),
        client.get("/v1/models"),
        client.get("/v1/models"),
    ]
    assert [reply.status_code for reply in replies] == [200, 404, 422, 415, 500, 200, 429]
    assert {reply.headers["ratelimit-policy"] for reply in replies} == {'"default";q=6;w=60'}
    assert [left(reply) for reply in replies] == [(5, 10), (4, 20), (3, 30), (2, 40), (1, 50), (0, 60), (0, 10)]


def test_what_is_open_to_all_is_never_refused_and_a_dead_key_is_no_tenants(
    service: Service, client: TestClient, clock: Clock
) -> None:
    limit(service, 1, clock)
    assert [client.get("/v1/models").status_code for _ in range(2)] == [200, 429]
    for path in OPEN_PATHS:
        reply = client.get(path)
        assert reply.status_code == 200, path
        assert "ratelimit" not in reply.headers
    dead = service.client("dfk_" + "a" * 43).get("/v1/models")
    assert_problem(dead, 401, "invalid_api_key")
    assert "ratelimit" not in dead.headers


def upload_by(service: Service, owner: Owner, receive: Receive, **headers: str) -> list[dict[str, Any]]:
    """What the app says to an upload whose body comes by `receive`."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/files",
        "query_string": b"",
        "headers": [
            (name.lower().encode(), value.encode()) for name, value in {**owner.client.headers, **headers}.items()
        ],
    }
    portal = service.open.portal
    assert portal is not None
    portal.call(service.app, scope, receive, send)
    return sent


def test_a_refused_upload_is_not_read(service: Service, owner: Owner, clock: Clock) -> None:
    limit(service, 1, clock)
    assert owner.client.get("/v1/models").status_code == 200

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was asked for")

    assert upload_by(service, owner, receive)[0]["status"] == 429
    assert service.spooled() == []


def test_who_hangs_up_in_an_upload_is_no_fault_of_ours(service: Service, owner: Owner) -> None:
    chunks: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"--b\r\n", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return chunks.pop(0)

    headers = {"content-type": "multipart/form-data; boundary=b", "content-length": "1000"}
    with structlog.testing.capture_logs() as logs:
        sent = upload_by(service, owner, receive, **headers)
    assert sent == []
    assert service.spooled() == []
    assert [line["status"] for line in logs if line["event"] == "http.answered"] == [499]
    assert not [line for line in logs if line["log_level"] == "error"]


def test_the_quota_is_the_setting(service: Service, owner: Owner) -> None:
    settings = service.settings.model_copy(update={"requests_per_minute": 2})
    with TestClient(create_app(settings), headers=owner.client.headers) as client:
        assert [client.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize("quota", [1, 7, 60, 1200, 100_000])
def test_retry_after_is_never_too_early_and_less_than_a_second_too_late(quota: int, clock: Clock) -> None:
    buckets = Buckets(quota, clock=clock)
    assert all(buckets.take("t").is_allowed for _ in range(quota))
    pauses = (0.0, 0.3, 0.01)
    for index, pause in enumerate(pauses):
        clock.advance(pause * 60 / quota)
        refused = buckets.take("t")
        assert (refused.is_allowed, refused.remaining) == (False, 0)
        owed = (1 - sum(pauses[: index + 1])) * 60 / quota
        assert owed <= refused.reset_seconds + 1e-6
        assert refused.reset_seconds < owed + 1 + 1e-6
    clock.advance(refused.reset_seconds)
    assert buckets.take("t").is_allowed


def test_a_steady_tenant_within_its_rate_is_never_refused_and_one_above_it_gets_its_rate(clock: Clock) -> None:
    buckets = Buckets(60, clock=clock)
    for _ in range(1000):
        clock.advance(1.0001)
        assert buckets.take("steady").is_allowed
    taken = 0
    for _ in range(3000):  # ten a second, for five minutes
        clock.advance(0.1)
        taken += buckets.take("eager").is_allowed
    assert 355 <= taken <= 361  # the bucket, and a minute's worth a minute


def test_tenants_that_have_gone_are_forgotten(clock: Clock) -> None:
    buckets = Buckets(60, clock=clock)
    for number in range(1000):
        buckets.take(f"tenant-{number}")
    clock.advance(WINDOW_SECONDS - 1)
    for _ in range(30):
        buckets.take("busy")
    clock.advance(1)
    assert buckets.take("new").remaining == 59
    assert set(buckets._left) == {"busy", "new"}
    assert buckets.take("busy").remaining == 30


def test_openais_client_comes_back_by_itself(
    service: Service, owner: Owner, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        clock.advance(seconds)

    monkeypatch.setattr(openai._base_client, "time", SimpleNamespace(**vars(time) | {"sleep": wait}))
    app = create_app(service.settings)
    app.state.buckets = Buckets(6, clock=clock)
    with running(service, app) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=_secret(owner), max_retries=1)
        assert [len(client.models.list().data) for _ in range(7)] == [1] * 7
        client.close()
    assert pauses == [10.0]


@pytest.fixture
def job_id(service: Service, owner: Owner) -> str:
    """A job that nobody works on: its stream has no end."""
    file_id = service.dataset(owner).id
    return owner.client.post("/v1/fine_tuning/jobs", json=job_body(file_id)).json()["id"]


def test_a_tenant_has_so_many_streams_and_each_that_is_closed_makes_room(
    service: Service, owner: Owner, job_id: str
) -> None:
    other = service.owner()
    others_job = other.client.post("/v1/fine_tuning/jobs", json=job_body(service.dataset(other).id)).json()["id"]
    service.settings.max_streams = 2
    with running(service) as port, ExitStack() as open_streams:
        client = open_streams.enter_context(_http(port, owner))
        job_stream = _opened(client, "GET", f"/v1/fine_tuning/jobs/{job_id}/events")
        image_stream = _opened(client, "POST", "/v1/images/generations", json=IMAGE)
        for method, path, body in [
            ("GET", f"/v1/fine_tuning/jobs/{job_id}/events", None),
            ("POST", "/v1/images/generations", IMAGE),
        ]:
            refused = _opened(client, method, path, json=body)
            assert refused.status_code == 429  # before it is read: a stream that was let in has no end
            refused.read()
            problem = assert_problem(refused, 429, "too_many_streams")
            assert problem["detail"] == "2 event streams are under way: let one end first"
            assert int(refused.headers["retry-after"]) > 0
        with service.database.read() as session:
            assert len(session.scalars(select(Sample)).all()) == 1, "a refused stream left a row"
        with _http(port, other) as others:
            _opened(others, "GET", f"/v1/fine_tuning/jobs/{others_job}/events").close()
        assert client.get(f"/v1/fine_tuning/jobs/{job_id}/events").status_code == 200  # a list is no stream
        for stream, method, path, body in [
            (job_stream, "GET", f"/v1/fine_tuning/jobs/{job_id}/events", None),
            (image_stream, "POST", "/v1/images/generations", IMAGE),
        ]:
            stream.close()
            wait_until(lambda m=method, p=path, b=body: _opened(client, m, p, json=b).status_code == 200)


@pytest.mark.parametrize("end", ["job_over", "unknown_model", "unknown_job", "bad_last_event_id", "async"])
def test_no_slot_stays_taken_when_the_reply_is_over(service: Service, owner: Owner, job_id: str, end: str) -> None:
    stream = {"Accept": "text/event-stream"}
    client = owner.client
    if end == "job_over":
        client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        assert client.get(f"/v1/fine_tuning/jobs/{job_id}/events", headers=stream).status_code == 200
    elif end == "unknown_model":
        assert client.post("/v1/images/generations", json=IMAGE | {"model": "gpt"}).status_code == 422
    elif end == "unknown_job":
        assert client.get("/v1/fine_tuning/jobs/ftjob-none/events", headers=stream).status_code == 404
    elif end == "bad_last_event_id":
        headers = stream | {"Last-Event-ID": "x"}
        assert client.get(f"/v1/fine_tuning/jobs/{job_id}/events", headers=headers).status_code == 422
    else:
        reply = client.post("/v1/images/generations", json=IMAGE, headers={"Prefer": "respond-async"})
        assert reply.status_code == 202
    assert service.app.state.streams._under_way == {}


def test_streams_and_uploads_are_counted_apart(service: Service, owner: Owner) -> None:
    with ExitStack() as held:
        for _ in range(service.settings.max_streams):
            held.enter_context(service.app.state.streams.one(owner.tenant.id))
        assert_problem(owner.client.post("/v1/images/generations", json=IMAGE), 429, "too_many_streams")
        assert upload(owner.client).status_code == 200


def test_a_gate_lets_in_so_many_from_however_many_threads() -> None:
    gate = Gate(3, "things", code="too_many_things")
    tried = threading.Barrier(12)

    def enter(_: int) -> bool:
        try:
            with gate.one("t"):
                tried.wait(20)  # whoever is in stays until everybody has tried
                return True
        except OverQuota:
            tried.wait(20)
            return False

    with ThreadPoolExecutor(12) as pool:
        assert sum(pool.map(enter, range(12))) == 3
    assert gate._under_way == {}


def _secret(owner: Owner) -> str:
    return str(owner.client.headers["authorization"]).removeprefix("Bearer ")


@contextmanager
def _http(port: int, owner: Owner) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {_secret(owner)}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=20, trust_env=False) as client:
        yield client


def _opened(client: httpx.Client, method: str, path: str, json: Any = None) -> httpx.Response:
    """The reply as far as its head; it ends when it is closed, or the client."""
    request = client.build_request(method, path, json=json, headers={"Accept": "text/event-stream"})
    return client.send(request, stream=True)
