"""`stream: true`: partial images as they come, then the images, or what went wrong."""

import base64
import hashlib
import json
from typing import Any

from fastapi.testclient import TestClient

from api import image_stream
from core.samples import service as samples
from core.samples.service import SamplePlan
from core.storage import keys
from tests import rows
from tests.api.conftest import Service
from tests.api.drawing import BODY, during


def _show(service: Service, plan: SamplePlan, number: int, data: bytes) -> None:
    """What a worker does with a partial image."""
    key = keys.partial_image(plan.tenant_id, plan.sample_id, plan.attempt, 0, number)
    service.store.put(key, data, "image/png")
    partial = {"key": key, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    with service.database.write() as session:
        assert samples.add_partial(session, plan, partial | {"index": 0, "number": number})


def test_a_stream_shows_partial_images_and_then_the_images(service: Service, client: TestClient) -> None:
    def act() -> None:
        with service.database.write() as session:
            [plan] = samples.claim(session, rows.WORKER, rows.LEASE, service.catalog, 10)
        assert plan.spec.partial_steps == (6, 13)
        for number in range(2):
            _show(service, plan, number, f"partial {number}".encode())
        service.deliver(plan)

    reply = during(client, BODY | {"n": 1, "stream": True, "partial_images": 2}, act)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "private, no-store"
    events = _events(reply.text)
    # Partial images that nobody looked at before the end are left out: a reader wants the picture.
    assert {event["type"] for event in events[:-1]} <= {"image_generation.partial_image"}
    last = events[-1]
    assert (last["type"], last["seed"]) == ("image_generation.completed", 5)
    assert base64.b64decode(last["b64_json"]) == b"picture 5"
    assert (last["size"], last["output_format"]) == ("8x8", "png")


def test_each_partial_image_is_sent_as_it_comes(service: Service, client: TestClient) -> None:
    made = client.post("/v1/images/generations", json={**BODY, "n": 1}, headers={"Prefer": "respond-async"}).json()
    with service.database.write() as session:
        [plan] = samples.claim(session, rows.WORKER, rows.LEASE, service.catalog, 10)
    _show(service, plan, 0, b"partial")
    services = client.app.state.services  # pyright: ignore[reportAttributeAccessIssue]
    events, shown, has_ended = image_stream._look(services, plan.tenant_id, made["id"], 0)
    assert [(event["type"], event["partial_image_index"]) for event in events] == [
        ("image_generation.partial_image", 0)
    ]
    assert base64.b64decode(events[0]["b64_json"]) == b"partial"
    assert (shown, has_ended) == (1, False)
    assert image_stream._look(services, plan.tenant_id, made["id"], shown) == ([], 1, False)


def test_a_stream_ends_with_what_went_wrong(service: Service, client: TestClient) -> None:
    def act() -> None:
        with service.database.write() as session:
            [plan] = samples.claim(session, rows.WORKER, rows.LEASE, service.catalog, 10)
            assert samples.fail(session, plan, code="image_not_finite", message="NaN")

    [event] = _events(during(client, BODY | {"stream": True}, act).text)
    assert (event["type"], event["error"]["code"]) == ("error", "image_not_finite")


def test_a_stream_whose_pictures_cannot_be_read_says_so_and_where_they_are(
    service: Service, client: TestClient
) -> None:
    def act() -> None:
        service.draw()
        for key in [info.key for info in service.store.list() if "/samples/" in info.key]:
            service.store.delete(key)

    reply = during(client, BODY | {"stream": True}, act)
    [event] = _events(reply.text)
    assert (event["type"], event["error"]["code"]) == ("error", "object_missing")
    assert "tenant-" not in event["error"]["message"]
    assert client.get(reply.headers["location"]).json()["status"] == "succeeded"


def _events(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    named = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert [event["type"] for event in found] == named
    return found
