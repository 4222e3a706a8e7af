"""Who may ask, and what a tenant can learn of another: nothing."""

import re
from typing import Any

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from sqlalchemy import update

from api.middleware import OPEN_PATHS
from api.routes import ROUTERS
from core.models import Tenant
from tests.api.conftest import Owner, Service, assert_problem, job_body, unknown, upload

ROUTES = [(method, route) for router in ROUTERS for route in router.routes for method in sorted(route.methods or ())]
KEY = "dfk_" + "a" * 43

# What a route needs beside the ids in its path. A route with an id that is not named here fails the test below.
BODIES: dict[str, Any] = {"PATCH /v1/adapters/{adapter_id}": {"metadata": {}}}
WITH_IDS = {
    "GET /v1/files/{file_id}",
    "DELETE /v1/files/{file_id}",
    "GET /v1/files/{file_id}/content",
    "HEAD /v1/files/{file_id}/content",
    "GET /v1/files/{file_id}/report",
    "GET /v1/fine_tuning/jobs/{job_id}",
    "POST /v1/fine_tuning/jobs/{job_id}/cancel",
    "POST /v1/fine_tuning/jobs/{job_id}/pause",
    "POST /v1/fine_tuning/jobs/{job_id}/resume",
    "GET /v1/fine_tuning/jobs/{job_id}/events",
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints",
    "GET /v1/fine_tuning/jobs/{job_id}/metrics",
    "GET /v1/fine_tuning/jobs/{job_id}/previews",
    "GET /v1/fine_tuning/jobs/{job_id}/previews/{preview_id}/content",
    "HEAD /v1/fine_tuning/jobs/{job_id}/previews/{preview_id}/content",
    "GET /v1/adapters/{adapter_id}",
    "PATCH /v1/adapters/{adapter_id}",
    "DELETE /v1/adapters/{adapter_id}",
    "GET /v1/adapters/{adapter_id}/content",
    "HEAD /v1/adapters/{adapter_id}/content",
    "GET /v1/models/{model_id:path}",
    "DELETE /v1/models/{model_id:path}",
    "GET /v1/images/generations/{generation_id}",
    "GET /v1/images/generations/{generation_id}/images/{index}",
    "POST /v1/images/generations/{generation_id}/cancel",
    "HEAD /v1/images/generations/{generation_id}/images/{index}",
    "DELETE /v1/api_keys/{key_id}",
    "GET /v1/evaluations/{evaluation_id}",
    "POST /v1/evaluations/{evaluation_id}/cancel",
}


def test_every_route_with_an_id_is_named_here() -> None:
    assert {f"{method} {route.path}" for method, route in ROUTES if "{" in route.path} == WITH_IDS


def test_no_route_stands_outside_the_routers(service: Service) -> None:
    documented = {(method.upper(), path) for path, item in service.app.openapi()["paths"].items() for method in item}
    routed = {
        (method, route.path.replace(":path}", "}"))
        for method, route in ROUTES
        if isinstance(route, APIRoute) and route.include_in_schema
    }
    assert documented == routed


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
@pytest.mark.parametrize("name", sorted(WITH_IDS))
def test_another_tenants_id_answers_byte_for_byte_as_an_unknown_one(
    service: Service, victim: Owner, name: str, accept: str
) -> None:
    method, template = name.split(" ")
    replies = []
    for ids in (victim.ids, {key: _like(value) for key, value in victim.ids.items()}):
        stranger = service.owner().client  # one each, for RateLimit counts what a tenant asks
        path = template
        for key, value in ids.items():
            path = path.replace(f"{{{key}}}", value)
        reply = stranger.request(method, path, json=BODIES.get(name), headers={"Accept": accept})
        assert reply.status_code == 404, reply.text
        text = reply.text
        for key in ids.keys() - {"index"}:
            text = text.replace(ids[key], f"<{key}>")
        headers = {key: value for key, value in reply.headers.items() if key not in ("x-request-id", "content-length")}
        replies.append((text, headers))
    assert replies[0] == replies[1]
    for key, value in victim.ids.items():  # and the owner still finds it
        if f"{{{key}}}" in template and method in ("GET", "HEAD"):
            path = template
            for own, value in victim.ids.items():
                path = path.replace(f"{{{own}}}", value)
            assert victim.client.request(method, path).status_code in (200, 410), path
            break


def test_ids_in_bodies_and_cursors_of_another_tenant_are_unknown_too(service: Service, victim: Owner) -> None:
    stranger = service.owner().client
    for mine, unknown_one in ((victim.ids["file_id"], unknown("file")), (victim.ids["file_id"], "x")):
        pair = [stranger.post("/v1/fine_tuning/jobs", json=job_body(file_id)) for file_id in (mine, unknown_one)]
        assert [reply.status_code for reply in pair] == [404, 404]
        assert pair[0].text.replace(mine, "<>") == pair[1].text.replace(f"file {unknown_one}", "file <>")
    model = victim.ids["model_id:path"]
    pair = [stranger.post("/v1/images/generations", json={"model": name}) for name in (model, "ft:nobody")]
    assert pair[0].text.replace(model, "<>") == pair[1].text.replace("ft:nobody", "<>")
    assert pair[0].status_code == 404
    for path, key in (
        ("files", "file_id"),
        ("fine_tuning/jobs", "job_id"),
        ("adapters", "adapter_id"),
        ("api_keys", "key_id"),
        ("images/generations", "generation_id"),
        ("evaluations", "evaluation_id"),
    ):
        assert_problem(stranger.get(f"/v1/{path}", params={"after": victim.ids[key]}), 404, "not_found", "/after")


def test_lists_hold_nothing_of_another_tenant(service: Service, victim: Owner) -> None:
    adapter = f"/v1/adapters/{victim.ids['adapter_id']}"
    assert victim.client.patch(adapter, json={"metadata": {"stage": "live"}}).status_code == 200
    stranger = service.owner().client
    for path in (
        "files",
        "fine_tuning/jobs",
        "fine_tuning/jobs?status=succeeded",
        "adapters",
        "adapters?metadata[stage]=live",
        "models",
        "images/generations",
        "evaluations",
        "api_keys",
    ):
        reply = stranger.get(f"/v1/{path}")
        told = reply.text + str(reply.headers)
        assert not [value for key, value in victim.ids.items() if key != "index" and value in told]
        assert victim.tenant.id not in told


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer ")],
        [("Authorization", "Bearer nonsense")],
        [("Authorization", f"Bearer {KEY}")],
        [("Authorization", f"bearer {KEY}")],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", f"Bearer {KEY} {KEY}")],
        [("Cookie", f"key={KEY}")],
        [("X-Api-Key", KEY)],
    ],
)
def test_no_key_no_answer(service: Service, headers: list[tuple[str, str]]) -> None:
    reply = service.open.get("/v1/files", headers=headers)
    assert_problem(reply, 401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


def test_only_the_documented_form_of_a_live_key_opens(service: Service, client: TestClient) -> None:
    secret = str(client.headers["authorization"]).removeprefix("Bearer ")
    assert client.get("/v1/files").status_code == 200
    nobody = service.open
    assert nobody.get("/v1/files", params={"api_key": secret, "key": secret}).status_code == 401
    assert nobody.get("/v1/files", headers={"Authorization": f"bearer {secret}"}).status_code == 401
    twice = [("Authorization", f"Bearer {secret}")] * 2
    assert nobody.get("/v1/files", headers=twice).status_code == 401


def test_who_one_says_to_be_changes_nothing(service: Service, victim: Owner) -> None:
    stranger = service.owner().client
    headers = {"X-Tenant-ID": victim.tenant.id, "X-User": victim.tenant.name, "Cookie": f"tenant={victim.tenant.id}"}
    assert stranger.get("/v1/files", headers=headers).json()["data"] == []


def test_a_suspended_tenant_is_shut_out_at_once(service: Service, owner: Owner, client: TestClient) -> None:
    assert client.get("/v1/files").status_code == 200
    with service.database.write() as session:
        session.execute(update(Tenant).where(Tenant.id == owner.tenant.id).values(status="suspended"))
    assert_problem(client.get("/v1/files"), 403, "tenant_suspended")
    assert_problem(upload(client), 403, "tenant_suspended")
    assert service.objects() == []


@pytest.mark.parametrize("path", ["/", "/admin", "/debug", "/v1", "/v1/tenants", "/metrics/", "/docs/x", "/redoc"])
def test_what_is_not_there_is_not_there(service: Service, client: TestClient, path: str) -> None:
    assert service.open.get(path).status_code == 401
    assert_problem(client.get(path), 404, "route_not_found")


def test_the_open_routes_name_no_tenant(service: Service, owner: Owner, victim: Owner) -> None:
    for path in OPEN_PATHS:
        reply = service.open.get(path)
        assert reply.status_code == 200, path
        assert not [name for name in (victim.tenant.id, victim.tenant.name, victim.ids["job_id"]) if name in reply.text]


def test_the_documentation_needs_no_other_host(service: Service) -> None:
    page = service.open.get("/docs").text
    linked = re.findall(r"(?:src|href|url)[=:] ?[\"']([^\"']+)", page)
    assert {"/openapi.json", "/docs/assets/swagger-ui-bundle.js", "/docs/assets/swagger-ui.css"} <= set(linked)
    assert [link for link in linked if not link.startswith("/")] == []
    assert {service.open.get(link).status_code for link in linked} == {200}


def test_every_reply_carries_what_keeps_it_private(service: Service, client: TestClient) -> None:
    for reply in (client.get("/v1/files"), client.get("/v1/files/x"), service.open.get("/v1/files"), upload(client)):
        assert reply.headers["cache-control"] == "private, no-store"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-request-id"].startswith("req-")


def _like(known: str) -> str:
    """An id of the same kind and length that nobody has."""
    return known if known == "0" else known[:-5] + "zzzzz"
