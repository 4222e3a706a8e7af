"""Hostile and careless input (FAULTS §2 A and E): refused by name, never a 500, nothing left behind."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from starlette.types import Message

from api.errors import Refusal
from api.middleware import Limits
from core.models import ApiKey, IdempotencyKey, Job
from core.samples import service as samples
from tests import rows
from tests.api.conftest import Owner, Service, assert_problem, job_body, upload

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def file_id(service: Service, owner: Owner) -> str:
    return service.dataset(owner).id


def send(client: TestClient, body: Any, path: str = JOBS, **headers: str) -> Any:
    """JSON as Python writes it: NaN and Infinity included."""
    return client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json", **headers})


def hyper(file_id: str, **values: Any) -> dict[str, Any]:
    return job_body(file_id, method={"type": "difffit", "difffit": {"hyperparameters": values}})


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", value) for value in ("1", True, 1.0, 0, -1, 2**31, 10**400, float("nan"), [], {}, "x\x00")]
    + [("learning_rate", value) for value in (float("nan"), float("inf"), -1, 0, 1e6, "0.1", True, 10**400)]
    + [("batch_size", value) for value in (-1, 0, 10**9)]
    + [("flip", "yes"), ("layout", "lora"), ("gamma_places", ["x"] * 10_000), ("gamma_depth", [[[[1]]]])]
    + [("status", "done"), ("s3_key", "x"), ("\x00", 1), ("\ud800", 1)],
)
def test_a_bad_hyperparameter_is_named(
    service: Service, client: TestClient, file_id: str, name: str, value: Any
) -> None:
    reply = send(client, hyper(file_id, **{name: value}))
    problem = assert_problem(reply, 422, "invalid")
    (error,) = problem["errors"]
    assert error["pointer"].startswith("/method/difffit/hyperparameters"), error
    assert _no_job(service)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 2**63), ("seed", -1), ("seed", 10**400), ("seed", "1"), ("seed", True), ("seed", 1.5),
        ("suffix", "a\x00"), ("suffix", "a:b"), ("suffix", "x" * 65), ("suffix", ""), ("suffix", "a\n"),
        ("model", ""), ("model", "m" * 10**5), ("model", 1), ("training_file", "f\x00"), ("training_file", "\ud800"),
        ("metadata", {"k": 1}), ("metadata", {"k" * 65: "v"}), ("metadata", {"k": "v" * 513}), ("metadata", []),
        ("metadata", {str(i): "v" for i in range(17)}), ("metadata", {"k": "a\x00"}), ("metadata", {"\ud800": "a"}),
        ("method", {"type": "lora"}), ("method", {"type": "difffit", "x": 1}), ("method", "difffit"),
        ("previews", {"every": 0}), ("previews", {"images": 1000}), ("previews", "yes"),
        ("tenant_id", "t"), ("status", "succeeded"), ("is_admin", True), ("s3_key", "k"),
        ("validation_file", "file-1"), ("integrations", [{"type": "wandb"}]),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(service: Service, client: TestClient, file_id: str, field: str, value: Any) -> None:
    problem = assert_problem(send(client, job_body(file_id) | {field: value}), 422, "invalid")
    assert all(item["pointer"].startswith(f"/{field}") for item in problem["errors"]), problem["errors"]
    assert problem["error"]["param"].startswith(field)
    assert _no_job(service)


@pytest.mark.parametrize(
    ("more", "pointer"),
    [
        ({"hyperparameters": {"steps": 5}}, "/hyperparameters"),
        ({"previews": {"every": 5}}, "/previews"),
    ],
)
def test_what_is_said_twice_is_named(client: TestClient, file_id: str, more: dict[str, Any], pointer: str) -> None:
    method = {"type": "difffit", "difffit": {"hyperparameters": {"preview_every": 5}}}
    assert_problem(send(client, job_body(file_id) | {"method": method} | more), 422, "invalid", pointer)


def test_what_a_reply_says_of_integrations_may_be_sent_back(client: TestClient, file_id: str) -> None:
    assert send(client, job_body(file_id) | {"integrations": []}).status_code == 200


@pytest.mark.parametrize("path", [JOBS, "/v1/images/generations", "/v1/evaluations"])
def test_a_models_name_may_be_as_long_wherever_one_is_named(client: TestClient, file_id: str, path: str) -> None:
    more = {JOBS: {"training_file": file_id}, "/v1/evaluations": {"file": file_id}}.get(path, {})
    longest = "ft:" + "x" * 297
    assert_problem(send(client, {"model": longest, **more}, path), 404, "model_not_found", "/model")
    assert_problem(send(client, {"model": f"{longest}x", **more}, path), 422, "invalid", "/model")


@pytest.mark.parametrize("text", ["' OR 1=1 --", "{{7*7}}", "%s%n", "<script>x</script>", "\x1b[31m\r\nX: y", "💣"])
def test_hostile_text_is_kept_as_text(client: TestClient, file_id: str, text: str) -> None:
    job = send(client, job_body(file_id, metadata={"note": text})).json()
    assert client.get(f"{JOBS}/{job['id']}").json()["metadata"] == {"note": text}
    assert client.post("/v1/api_keys", json={"name": text}).json()["name"] == text


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"nul", b"\xff\xfe", b'{"model": "\xc3\x28"}', b"9" * 5000,
        b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1",
    ],
)  # fmt: skip
def test_what_is_no_json_is_malformed(client: TestClient, body: bytes) -> None:
    reply = client.post(JOBS, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["code"] in ("malformed_json", "malformed_request")


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"x"', b""])
def test_what_is_no_object_is_refused(client: TestClient, body: bytes) -> None:
    assert_problem(client.post(JOBS, content=body, headers={"Content-Type": "application/json"}), 422, "invalid")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files",
        JOBS,
        "/v1/adapters",
        f"{JOBS}/x/events",
        f"{JOBS}/x/checkpoints",
        "/v1/images/generations",
        "/v1/api_keys",
    ],
)
@pytest.mark.parametrize("query", ["limit=0", "limit=-1", "limit=101", f"limit={10**20}", "limit=x", "after=%00"])
def test_page_parameters_are_bounded(client: TestClient, path: str, query: str) -> None:
    assert_problem(client.get(f"{path}?{query}"), 422, "invalid")


@pytest.mark.parametrize("path", ["/v1/files/a%00b", "/v1/models/%00", f"{JOBS}/%00/events", "/v1/files/%ff", "/%00"])
def test_a_hostile_path_is_not_found(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/files", "GET, POST"), ("TRACE", "/v1/files", "GET, POST"), ("PATCH", f"{JOBS}/x", "GET"),
        ("DELETE", JOBS, "GET, POST"), ("POST", "/v1/adapters/x", "DELETE, GET, PATCH"), ("POST", "/healthz", "GET"),
        ("POST", "/v1/models/a/b", "DELETE, GET"),
    ],
)  # fmt: skip
def test_a_wrong_verb_is_told_the_right_ones(client: TestClient, method: str, path: str, allow: str) -> None:
    reply = client.request(method, path)
    assert_problem(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == allow


def test_a_method_override_is_ignored(client: TestClient, file_id: str) -> None:
    assert client.get(f"/v1/files/{file_id}", headers={"X-HTTP-Method-Override": "DELETE"}).status_code == 200
    assert client.get(f"/v1/files/{file_id}").status_code == 200


def test_an_encoded_body_is_not_decoded(service: Service, client: TestClient) -> None:
    reply = client.post(JOBS, content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert_problem(reply, 415, "unsupported_media_type")
    assert_problem(
        client.post(JOBS, content=b"a=b", headers={"Content-Type": "text/plain"}), 415, "unsupported_media_type"
    )


def test_a_body_over_the_cap_is_refused_whatever_it_says_of_its_length(service: Service, client: TestClient) -> None:
    cap, seen = service.settings.max_body_bytes, 0

    def chunks() -> Any:
        nonlocal seen
        for _ in range(100):
            seen += cap // 10
            yield b" " * (cap // 10)

    honest = client.post(JOBS, content=b" " * (cap + 1), headers={"Content-Type": "application/json"})
    assert_problem(honest, 413, "body_too_large")
    chunked = client.post(JOBS, content=chunks(), headers={"Content-Type": "application/json"})
    assert_problem(chunked, 413, "body_too_large")


@pytest.mark.parametrize("length", ["-1", "1e3", "x", "1, 2", "9" * 30])
def test_a_length_that_is_none_is_malformed(client: TestClient, length: str) -> None:
    reply = client.post(JOBS, content=b"{}", headers={"Content-Length": length, "Content-Type": "application/json"})
    assert_problem(reply, 400, "malformed_request")


def test_a_body_that_crawls_is_cut(service: Service) -> None:
    moment, read = 0.0, 0

    async def receive() -> Message:
        nonlocal moment
        moment += 1.0  # a byte a second
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        nonlocal read
        while True:
            read += len((await receive())["body"])

    async def send(_: Message) -> None: ...

    limits = Limits(app, service.settings, clock=lambda: moment)
    scope = {"type": "http", "method": "POST", "path": "/v1/files", "headers": [], "query_string": b""}
    with pytest.raises(Refusal) as refused:
        asyncio.run(limits(scope, receive, send))
    assert (refused.value.status_code, refused.value.error.code) == (408, "body_too_slow")
    assert read == 60


def test_a_body_that_stops_is_cut(service: Service) -> None:
    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        await receive()

    async def send(_: Message) -> None: ...

    limits = Limits(app, service.settings, idle_seconds=0.05)
    scope = {"type": "http", "method": "POST", "path": "/v1/files", "headers": [], "query_string": b""}
    with pytest.raises(Refusal) as refused:
        asyncio.run(limits(scope, receive, send))
    assert refused.value.error.code == "body_too_slow"


# --- Idempotency-Key -------------------------------------------------------------------------------------------------


def test_the_same_request_without_a_key_happens_as_often_as_it_is_sent(
    service: Service, client: TestClient, file_id: str
) -> None:
    made = {send(client, job_body(file_id, seed=1)).json()["id"] for _ in range(2)}
    with service.database.read() as session:
        assert set(session.scalars(select(Job.id))) == made
    assert len(made) == 2


def test_the_same_request_under_one_key_happens_once(service: Service, client: TestClient, file_id: str) -> None:
    first = send(client, job_body(file_id), **{"Idempotency-Key": "k1"})
    again = send(client, job_body(file_id), **{"Idempotency-Key": "k1"})
    assert first.json() == again.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    with service.database.read() as session:
        assert len(session.scalars(select(Job)).all()) == 1


def test_many_at_once_under_one_key_happen_once(service: Service, client: TestClient, file_id: str) -> None:
    def ask(_: int) -> Any:
        return send(client, job_body(file_id), **{"Idempotency-Key": "k1"})

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, range(16)))
    assert {reply.status_code for reply in replies} <= {200, 409}
    assert len({reply.json()["id"] for reply in replies if reply.status_code == 200}) == 1
    with service.database.read() as session:
        assert len(session.scalars(select(Job)).all()) == 1


def test_one_key_for_two_requests_is_refused(client: TestClient, file_id: str) -> None:
    send(client, job_body(file_id), **{"Idempotency-Key": "k1"})
    other = send(client, job_body(file_id, seed=1), **{"Idempotency-Key": "k1"})
    assert_problem(other, 422, "idempotency_key_reused")
    assert_problem(
        send(client, {"name": "x"}, "/v1/api_keys", **{"Idempotency-Key": "k1"}), 422, "idempotency_key_reused"
    )


def test_two_tenants_keys_are_unrelated(service: Service, client: TestClient, file_id: str) -> None:
    mine = send(client, job_body(file_id), **{"Idempotency-Key": "k1"}).json()
    other = service.owner()
    theirs = send(other.client, job_body(service.dataset(other).id), **{"Idempotency-Key": "k1"})
    assert theirs.status_code == 200
    assert theirs.json()["id"] != mine["id"]


@pytest.mark.parametrize("key", ["", " ", "k" * 256, "ключ".encode(), "a\x7fb", "a\tb"])
def test_a_bad_idempotency_key_is_malformed(service: Service, client: TestClient, file_id: str, key: Any) -> None:
    assert_problem(send(client, job_body(file_id), **{"Idempotency-Key": key}), 400, "bad_idempotency_key")
    assert_problem(upload(client, **{"Idempotency-Key": key}), 400, "bad_idempotency_key")
    assert _no_job(service)


def test_a_request_that_failed_may_be_sent_again_under_its_key(client: TestClient, file_id: str) -> None:
    bad = send(client, job_body(file_id, model="nope"), **{"Idempotency-Key": "k1"})
    assert bad.status_code == 422
    assert send(client, job_body(file_id), **{"Idempotency-Key": "k1"}).status_code == 200


def test_a_request_under_way_is_a_conflict(service: Service, owner: Owner, client: TestClient, file_id: str) -> None:
    send(client, job_body(file_id), **{"Idempotency-Key": "k1"})
    with service.database.write() as session:
        session.get_one(IdempotencyKey, (owner.tenant.id, "k1")).status_code = 0
    reply = send(client, job_body(file_id), **{"Idempotency-Key": "k1"})
    assert_problem(reply, 409, "idempotency_in_flight")
    assert (reply.headers["retry-after"], reply.headers.get("x-should-retry")) == ("1", None)


def test_an_upload_sent_twice_under_one_key_is_one_file(service: Service, client: TestClient) -> None:
    first, again = (upload(client, **{"Idempotency-Key": "k1"}) for _ in range(2))
    assert first.json() == again.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert len(service.objects()) == 1
    assert_problem(
        upload(client, b"PK\x05\x06" + b"\0" * 18, **{"Idempotency-Key": "k1"}), 422, "idempotency_key_reused"
    )


def test_images_asked_for_twice_under_one_key_are_drawn_once(service: Service, client: TestClient) -> None:
    ask = {"model": "tiny-dit", "prompt": "circle", "seed": 3}
    headers = {"Idempotency-Key": "k1"}
    queued = client.post("/v1/images/generations", json=ask, headers=headers | {"Prefer": "respond-async"})
    service.draw()
    again = client.post("/v1/images/generations", json=ask, headers=headers)
    assert again.json()["id"] == queued.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    service.draw(0)


def test_images_that_failed_are_drawn_anew_under_their_key(service: Service, client: TestClient) -> None:
    ask = {"model": "tiny-dit", "prompt": "circle", "seed": 3}
    headers = {"Idempotency-Key": "k1", "Prefer": "respond-async"}
    first = client.post("/v1/images/generations", json=ask, headers=headers).json()["id"]
    with service.database.write() as session:
        [plan] = samples.claim(session, rows.WORKER, rows.LEASE, service.catalog, 1)
        assert samples.fail(session, plan, code="crashed", message="it went wrong")
    again = client.post("/v1/images/generations", json=ask, headers=headers)
    assert "idempotency-replayed" not in again.headers
    assert again.json()["id"] != first
    service.draw()
    kept = client.post("/v1/images/generations", json=ask, headers={"Idempotency-Key": "k1"})
    assert (kept.json()["id"], kept.headers["idempotency-replayed"]) == (again.json()["id"], "true")


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"Seed": 3}, "/Seed"),
        ({"list": 3}, "/list"),
        ({"metadata": {"Team": 5}}, "/metadata/Team"),
        ({"previews": {"Every": 5}}, "/previews/Every"),
    ],
)
def test_a_field_is_named_whatever_it_is_called(
    client: TestClient, file_id: str, fields: dict[str, Any], pointer: str
) -> None:
    problem = assert_problem(send(client, job_body(file_id) | fields), 422, "invalid")
    assert pointer in [item["pointer"] for item in problem["errors"]]


def test_the_secret_of_a_key_is_not_kept_for_a_replay(service: Service, client: TestClient) -> None:
    secret = send(client, {"name": "ci"}, "/v1/api_keys", **{"Idempotency-Key": "k1"}).json()["secret"]
    again = send(client, {"name": "ci"}, "/v1/api_keys", **{"Idempotency-Key": "k1"})
    assert_problem(again, 409, "secret_not_kept")
    assert secret.encode() not in (service.settings.data_dir / "difffit.db").read_bytes()
    with service.database.read() as session:
        assert len(session.scalars(select(ApiKey).where(ApiKey.name == "ci")).all()) == 1


def _no_job(service: Service) -> bool:
    with service.database.read() as session:
        return session.scalars(select(Job)).all() == [] and session.scalars(select(IdempotencyKey)).all() == []
