import base64
import json
import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from core.models import Sample
from core.samples import service as samples
from tests import rows
from tests.api.conftest import Owner, Service, assert_problem

BODY = {"model": "tiny-dit", "prompt": "circle", "n": 2, "seed": 5}


def test_images_come_back_as_base64_with_their_seeds(service: Service, client: TestClient) -> None:
    reply = _drawn(service, client, BODY)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert [base64.b64decode(item["b64_json"]) for item in body["data"]] == [b"picture 5", b"picture 6"]
    assert [item["seed"] for item in body["data"]] == [5, 6]
    assert (body["model"], body["stats"]["adapter_residency"]) == ("tiny-dit", "hot")


def test_images_come_back_as_urls_that_ask_for_the_key(service: Service, client: TestClient) -> None:
    body = _drawn(service, client, BODY | {"response_format": "url"}).json()
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


def test_a_request_that_takes_too_long_tells_where_to_look(service: Service, client: TestClient) -> None:
    service.settings.image_wait_seconds = 0.2
    reply = client.post("/v1/images/generations", json=BODY)
    assert_problem(reply, 503, "image_not_ready")
    assert int(reply.headers["retry-after"]) > 0
    assert reply.headers["x-should-retry"] == "false"
    service.draw()
    assert client.get(reply.headers["location"]).json()["status"] == "succeeded"


@pytest.mark.parametrize(
    ("code", "status"), [("unknown_class", 422), ("crashed", 503), ("adapter_corrupt", 503), ("internal_error", 503)]
)
def test_a_request_that_failed_says_why(service: Service, client: TestClient, code: str, status: int) -> None:
    def fail() -> None:
        with service.database.write() as session:
            (plan,) = samples.claim(session, rows.WORKER, rows.LEASE, service.catalog, 1)
            assert samples.fail(session, plan, code=code, message="it went wrong")

    assert_problem(_during(client, BODY, fail), status, code)


def test_a_tuned_model_draws_its_own_classes(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    reply = client.post("/v1/images/generations", json={"model": adapter.model, "prompt": "circle"})
    assert_problem(reply, 422, "unknown_class", "/prompt")
    assert _drawn(service, client, {"model": adapter.model, "prompt": "b"}).status_code == 200
    with service.database.read() as session:
        sample = session.scalars(select(Sample)).one()
    assert (sample.adapter_id, sample.request["label"], sample.request["guidance"]) == (adapter.id, 1, "domain")


def test_a_model_of_a_base_that_has_changed_is_refused(service: Service, owner: Owner, client: TestClient) -> None:
    _, adapter = service.trained(owner)
    with service.database.write() as session:
        session.merge(adapter).base_fingerprint = "another"
    assert_problem(client.post("/v1/images/generations", json={"model": adapter.model}), 409, "base_changed", "/model")


def test_images_that_were_kept_long_enough_are_said_to_be_gone(service: Service, client: TestClient) -> None:
    body = _drawn(service, client, BODY).json()
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
        ("model", "nope"), ("output_format", "webp"), ("quality", "hd"), ("style", "vivid"), ("stream", True),
        ("background", "transparent"), ("tenant_id", "x"), ("status", "succeeded"),
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
    assert [item["pointer"] for item in problem["errors"]] == [f"/{field}"]
    with service.database.read() as session:
        assert session.scalars(select(Sample)).all() == []


def test_what_means_nothing_here_is_taken(service: Service, client: TestClient) -> None:
    more = {"user": "me", "output_format": "png", "quality": "standard", "background": "opaque", "size": "8x8"}
    assert _drawn(service, client, BODY | more).status_code == 200


def _drawn(service: Service, client: TestClient, body: dict[str, Any]) -> Any:
    return _during(client, body, service.draw)


def _during(client: TestClient, body: dict[str, Any], act: Any) -> Any:
    """The reply to a request that `act` answers while it waits."""
    replies: list[Any] = []
    asking = threading.Thread(target=lambda: replies.append(client.post("/v1/images/generations", json=body)))
    asking.start()
    database = client.app.state.database  # pyright: ignore[reportAttributeAccessIssue]
    while asking.is_alive():
        with database.read() as session:
            if session.scalar(select(Sample.id).where(Sample.status == "queued")):
                break
    act()
    asking.join(20)
    return replies[0]
