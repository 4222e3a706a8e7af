import asyncio
import base64
import json
import time
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from core.models import Sample
from core.samples import service as samples
from tests import rows
from tests.api.conftest import Owner, Service, assert_problem
from tests.api.drawing import BODY, drawn, during


def test_images_come_back_as_base64_with_their_seeds(service: Service, client: TestClient) -> None:
    reply = drawn(service, client, BODY)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert [base64.b64decode(item["b64_json"]) for item in body["data"]] == [b"picture 5", b"picture 6"]
    assert [item["seed"] for item in body["data"]] == [5, 6]
    assert (body["model"], body["stats"]["adapter_residency"]) == ("tiny-dit", "hot")


@pytest.mark.parametrize("stream", [False, True])
def test_what_images_cost_is_measured_where_it_is_answered(service: Service, client: TestClient, stream: bool) -> None:
    assert drawn(service, client, BODY | {"stream": stream}).status_code == 200
    assert_problem(client.post("/v1/images/generations", json=BODY | {"timeout": 0.05}), 504, "deadline_exceeded")
    told = service.open.get("/metrics").text
    for part, seconds in (("queue", 0.03), ("compute", 0.2)):
        assert f"difffit_image_{part}_seconds_count 1.0" in told
        assert f"difffit_image_{part}_seconds_sum {seconds}" in told


def test_images_come_back_as_urls_that_ask_for_the_key(service: Service, client: TestClient) -> None:
    body = drawn(service, client, BODY | {"response_format": "url"}).json()
    url = body["data"][1]["url"]
    assert url.startswith("http://testserver/v1/images/generations/img-")
    assert client.get(url).content == b"picture 6"
    assert client.get(url).headers["content-type"] == "image/png"
    assert_problem(service.open.get(url), 401, "invalid_api_key")
    assert_problem(client.get(url.removesuffix("1") + "2"), 404, "not_found")
    assert_problem(client.get(url.removesuffix("1") + "01"), 404, "not_found")


def test_respond_async_answers_at_once(service: Service, client: TestClient) -> None:
    reply = client.post("/v1/images/generations", json=BODY, headers={"Prefer": "respond-async"})
    assert reply.status_code == 202
    location = reply.headers["location"]
    assert client.get(location).json()["status"] == "queued"
    service.draw()
    done = client.get(location).json()
    assert (done["status"], [item["seed"] for item in done["data"]]) == ("succeeded", [5, 6])
    assert client.get(done["data"][0]["url"]).content == b"picture 5"


def test_a_request_whose_location_was_lost_is_found_again(service: Service, client: TestClient) -> None:
    def asked(by: TestClient) -> str:
        made = by.post("/v1/images/generations", json=BODY, headers={"Prefer": "respond-async"})
        return made.headers["location"]

    first = asked(client)
    service.draw()
    waiting, _ = asked(client), asked(service.owner().client)
    page = client.get("/v1/images/generations", params={"limit": 1}).json()
    assert (page["data"], page["has_more"]) == ([client.get(waiting).json()], True)
    rest = client.get("/v1/images/generations", params={"after": page["last_id"]}).json()
    assert (rest["data"], rest["has_more"]) == ([client.get(first).json()], False)
    assert client.get(rest["data"][0]["data"][1]["url"]).content == b"picture 6"


def test_images_that_are_gone_hold_up_no_list(service: Service, client: TestClient) -> None:
    body = drawn(service, client, BODY).json()
    with service.database.write() as session:
        session.get_one(Sample, body["id"]).images = None
    [listed] = client.get("/v1/images/generations").json()["data"]
    assert (listed["id"], listed["status"], listed["data"]) == (body["id"], "succeeded", None)


def test_a_request_that_takes_too_long_tells_where_to_look(service: Service, client: TestClient) -> None:
    service.settings.image_wait_seconds = 0.2
    reply = client.post("/v1/images/generations", json=BODY)
    assert_problem(reply, 503, "image_not_ready")
    assert int(reply.headers["retry-after"]) > 0
    assert reply.headers["x-should-retry"] == "false"
    service.draw()
    assert client.get(reply.headers["location"]).json()["status"] == "succeeded"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("unknown_class", 422),
        ("image_not_finite", 422),
        ("unknown_prompt", 422),
        ("object_missing", 410),
        ("crashed", 503),
        ("adapter_corrupt", 503),
        ("internal_error", 500),
    ],
)
def test_a_request_that_failed_says_why(service: Service, client: TestClient, code: str, status: int) -> None:
    def fail() -> None:
        with service.database.write() as session:
            (plan,) = samples.claim(session, rows.WORKER, rows.LEASE, service.catalog, 1)
            assert samples.fail(session, plan, code=code, message="it went wrong")

    reply = during(client, BODY, fail)
    assert_problem(reply, status, code)
    if status == 503:  # it was tried as often as it may be
        assert reply.headers["x-should-retry"] == "false"
        assert "retry-after" not in reply.headers


def test_a_tuned_model_draws_its_own_classes(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    reply = client.post("/v1/images/generations", json={"model": adapter.model, "prompt": "circle"})
    assert_problem(reply, 422, "unknown_class", "/prompt")
    assert drawn(service, client, {"model": adapter.model, "prompt": "b"}).status_code == 200
    with service.database.read() as session:
        sample = session.scalars(select(Sample)).one()
    part = {"adapter_id": adapter.id, "model": adapter.model, "weight": 1.0, "label": 1}
    assert (sample.request["adapters"], sample.request["guidance"]) == ([part], "cfg")
    assert (sample.adapter_id, sample.model) == (adapter.id, adapter.model)


def test_a_model_of_a_base_that_has_changed_is_refused(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    with service.database.write() as session:
        session.merge(adapter).base_fingerprint = "another"
    assert_problem(client.post("/v1/images/generations", json={"model": adapter.model}), 409, "base_changed", "/model")


def test_images_that_were_kept_long_enough_are_said_to_be_gone(service: Service, client: TestClient) -> None:
    body = drawn(service, client, BODY).json()
    with service.database.write() as session:
        session.get_one(Sample, body["id"]).images = None
    reply = client.get(f"/v1/images/generations/{body['id']}/images/0")
    assert_problem(reply, 410, "images_expired")
    assert client.get(f"/v1/images/generations/{body['id']}").json()["data"] is None


def test_a_tenant_has_only_so_many_unfinished_requests(service: Service, client: TestClient) -> None:
    service.settings.max_queued_samples = 1
    headers = {"Prefer": "respond-async"}
    assert client.post("/v1/images/generations", json=BODY, headers=headers).status_code == 202
    assert_problem(client.post("/v1/images/generations", json=BODY, headers=headers), 429, "over_quota")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 17), ("n", "2"), ("n", True), ("n", 1.0), ("n", 10**400),
        ("size", "1000000x1000000"), ("size", "7x7"), ("size", "8X8"),
        ("seed", -1), ("seed", 2**63), ("steps", 0), ("steps", 2**31), ("solver", "magic"),
        ("guidance", "domain"), ("guidance_scale", float("nan")), ("guidance_scale", 1e6),
        ("adapter_scale", float("inf")), ("prompt", "cat"), ("prompt", "circle\x00"), ("prompt", "x" * 10**6),
        ("model", "nope"), ("output_format", "gif"), ("quality", "hd"), ("style", "vivid"), ("stream", "yes"),
        ("background", "transparent"), ("tenant_id", "x"), ("status", "succeeded"), ("output_compression", 50),
        ("guidance_interval", [0.8, 0.2]), ("guidance_interval", [0.0, 2.0]), ("guidance_interval", [0.5]),
        ("guidance_interval", ["0", 1]),
        ("timeout", 0), ("timeout", 1e9), ("adapters", []), ("partial_images", 4),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_before_it_is_queued(
    service: Service, client: TestClient, field: str, value: object
) -> None:
    reply = client.post(
        "/v1/images/generations",
        content=json.dumps(BODY | {field: value}),
        headers={"Content-Type": "application/json"},
    )
    problem = reply.json()
    assert reply.status_code == 422, reply.text
    assert {item["pointer"].split("/")[1] for item in problem["errors"]} == {field}
    with service.database.read() as session:
        assert session.scalars(select(Sample)).all() == []


def test_an_interval_of_guidance_is_kept_as_it_was_asked(client: TestClient) -> None:
    asked = BODY | {"guidance_interval": [0, 0.8], "timeout": 20}
    reply = client.post("/v1/images/generations", json=asked, headers={"Prefer": "respond-async"})
    assert reply.status_code == 202, reply.text
    request = reply.json()["request"]
    assert (request["guidance_interval"], request["timeout"]) == ([0, 0.8], 20)


def test_what_means_nothing_here_is_taken(service: Service, client: TestClient) -> None:
    more = {"user": "me", "output_format": "png", "quality": "standard", "background": "opaque", "size": "8x8"}
    assert drawn(service, client, BODY | more).status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stream": False, "partial_images": 2}, "partial_images needs stream: true"),
        ({"response_format": "url", "stream": True}, "a stream carries b64_json"),
        ({"adapters": [{"model": "ft:x"}], "adapter_scale": 0.5}, "give each of adapters its weight"),
        ({"adapter_scale": 0.5}, "adapter_scale is for a tuned model"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(client: TestClient, fields: dict[str, Any], words: str) -> None:
    reply = client.post("/v1/images/generations", json=BODY | fields)
    problem = assert_problem(reply, 422, "invalid", f"/{[*fields][-1]}")
    assert words in problem["detail"]


def test_a_mix_names_the_base_and_adapters_that_draw_the_class(
    service: Service, owner: Owner, client: TestClient
) -> None:
    (_, one), (_, two) = service.trained(owner), service.trained(owner)
    parts = [{"model": one.model, "weight": 0.25}, {"model": two.model}]
    body = {"model": "tiny-dit", "prompt": "b", "adapters": parts}
    reply = drawn(service, client, body).json()
    with service.database.read() as session:
        sample = session.get_one(Sample, reply["id"])
    assert [(part["adapter_id"], part["weight"], part["label"]) for part in sample.request["adapters"]] == [
        (one.id, 0.25, 1),
        (two.id, 1.0, 1),
    ]
    assert (sample.model, sample.adapter_id, sample.request["guidance"]) == ("tiny-dit", None, "cfg")

    def refused(**fields: Any) -> Any:
        return client.post("/v1/images/generations", json=body | fields)

    assert_problem(refused(prompt="circle"), 422, "unknown_class", "/prompt")
    assert_problem(refused(model=one.model), 422, "invalid", "/model")
    assert_problem(refused(adapters=[{"model": "tiny-dit"}]), 422, "invalid", "/adapters/0/model")
    assert_problem(refused(adapters=[*parts, {"model": "ft:nobody"}]), 404, "model_not_found", "/adapters/2/model")
    assert_problem(refused(adapters=parts * 3), 422, "invalid", "/adapters")
    assert_problem(refused(adapters=[{"model": one.model, "weight": 9}]), 422, "invalid", "/adapters/0/weight")
    stranger = service.owner().client
    foreign = stranger.post("/v1/images/generations", json=body)
    assert_problem(foreign, 404, "model_not_found", "/adapters/0/model")


def test_an_image_comes_as_the_format_that_was_asked_for(service: Service, client: TestClient) -> None:
    asked = BODY | {"output_format": "webp", "output_compression": 80, "response_format": "url"}
    body = drawn(service, client, asked).json()
    assert body["output_format"] == "webp"
    image = client.get(body["data"][0]["url"])
    assert image.headers["content-type"] == "image/webp"
    assert ".webp" in image.headers["content-disposition"]


def test_a_waiting_request_is_cancelled_at_once_and_a_running_one_before_its_next_step(
    service: Service, client: TestClient
) -> None:
    def asked() -> str:
        reply = client.post("/v1/images/generations", json=BODY, headers={"Prefer": "respond-async"})
        return reply.headers["location"]

    waiting = asked()
    assert client.post(f"{waiting}/cancel").json()["status"] == "cancelled"
    problem = assert_problem(client.post(f"{waiting}/cancel"), 409, "generation_ended")
    assert "is cancelled already" in problem["detail"]
    running = asked()
    with service.database.write() as session:
        [plan] = samples.claim(session, rows.WORKER, rows.LEASE, service.catalog, 10)
    assert client.post(f"{running}/cancel").json()["status"] == "running"
    with service.database.write() as session:
        assert samples.list_cancelled(session, [plan.sample_id]) == [plan.sample_id]
        assert samples.stop(session, plan)
    assert client.get(running).json()["status"] == "cancelled"


def test_a_caller_whose_request_is_cancelled_meanwhile_is_told(service: Service, client: TestClient) -> None:
    def act() -> None:
        with service.database.write() as session:
            samples.cancel(session, session.scalars(select(Sample)).one())

    assert_problem(during(client, BODY, act), 409, "cancelled")


def test_a_request_whose_time_is_over_is_504_and_never_drawn(service: Service, client: TestClient) -> None:
    reply = client.post("/v1/images/generations", json=BODY | {"timeout": 0.05})
    problem = assert_problem(reply, 504, "deadline_exceeded")
    assert "within its timeout" in problem["detail"]
    assert reply.headers["x-should-retry"] == "false"
    service.draw(0)
    late = client.post(
        "/v1/images/generations", json=BODY | {"timeout": 0.05}, headers={"Prefer": "respond-async"}
    ).headers["location"]
    time.sleep(0.1)
    service.draw(0)
    with service.database.write() as session:
        assert samples.expire(session) == [late.rsplit("/", 1)[1]]
    assert client.get(late).json()["error"]["code"] == "deadline_exceeded"


def test_the_queue_is_bounded_over_all_tenants(service: Service, client: TestClient) -> None:
    service.settings.max_waiting_samples = 1
    headers = {"Prefer": "respond-async"}
    assert service.owner().client.post("/v1/images/generations", json=BODY, headers=headers).status_code == 202
    reply = client.post("/v1/images/generations", json=BODY, headers=headers)
    assert_problem(reply, 503, "queue_full")
    assert int(reply.headers["retry-after"]) > 0
    service.draw()
    assert client.post("/v1/images/generations", json=BODY, headers=headers).status_code == 202


def test_a_name_in_a_mix_that_is_none_is_blamed_in_its_place(client: TestClient) -> None:
    reply = client.post("/v1/images/generations", json=BODY | {"adapters": [{"model": "nonsense"}]})
    assert_problem(reply, 422, "unknown_model", "/adapters/0/model")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("key", [None, "again"])
def test_who_hangs_up_has_cancelled_unless_a_key_says_that_it_may_come_back(
    service: Service, client: TestClient, stream: bool, key: str | None
) -> None:
    portal = service.open.portal
    assert portal is not None
    headers = {**client.headers, "content-type": "application/json"} | ({"idempotency-key": key} if key else {})
    portal.call(_hang_up, service.app, json.dumps(BODY | {"stream": stream}).encode(), headers)
    with service.database.read() as session:
        assert session.scalars(select(Sample.status)).one() == ("queued" if key else "cancelled")


async def _hang_up(app: Any, body: bytes, headers: dict[str, str]) -> None:
    """Send a request whole, wait until its reply has begun or the work is queued, and close the connection."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.sleep(0.3)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        pass

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/images/generations",
        "raw_path": b"/v1/images/generations",
        "query_string": b"",
        "root_path": "",
        "server": ("testserver", 80),
        "client": ("testclient", 1),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "state": {},
    }
    await asyncio.wait_for(app(scope, receive, send), 10)
