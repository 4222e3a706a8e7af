"""The OpenAPI document says what the service does: no more, no less."""

from collections.abc import Iterator
from typing import Any

import pytest

from core.errors import Invalid
from core.training.hyperparameters import NAMES
from core.training.spec import POINTER, resolve
from tests.api.conftest import Owner, Service
from tests.rows import base_of

Operation = tuple[str, str, dict[str, Any]]


def operations(service: Service) -> Iterator[Operation]:
    """(method, path, what is said of it)"""
    for path, methods in service.app.openapi()["paths"].items():
        for method, said in methods.items():
            yield method.upper(), path, said


def takes(said: dict[str, Any], header: str) -> bool:
    return {"$ref": f"#/components/parameters/{header}"} in said.get("parameters", [])


def of(owner: Owner, path: str) -> str:
    """The path with the owner's own ids."""
    for name, value in owner.ids.items():
        path = path.replace(f"{{{name.removesuffix(':path')}}}", value)
    return path


def test_operations_have_names_summaries_and_documented_errors(service: Service) -> None:
    paths = service.app.openapi()["paths"]
    operations = [operation for methods in paths.values() for operation in methods.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    for path, methods in paths.items():
        for operation in methods.values():
            assert operation["summary"]
            if path.startswith("/v1/"):
                assert {"401", "403", "429", "503"} <= operation["responses"].keys()
                assert operation["security"] == [{"key": []}]
            if "{" in path:
                assert "404" in operation["responses"]
    assert "HTTPValidationError" not in str(service.app.openapi())


def test_an_idempotency_key_is_said_wherever_it_counts(service: Service, victim: Owner) -> None:
    for method, path, said in operations(service):
        reply = victim.client.request(method, of(victim, path), headers={"Idempotency-Key": "k" * 256})
        counts = reply.status_code == 400 and reply.json()["error"]["code"] == "bad_idempotency_key"
        assert takes(said, "Idempotency-Key") == counts, (method, path)
        if method == "POST":
            assert {"400", "409", "422"} <= said["responses"].keys(), path


def test_what_has_an_entity_tag_says_that_it_may_be_there_already(service: Service, victim: Owner) -> None:
    for method, path, said in operations(service):
        if method == "GET":
            reply = victim.client.get(of(victim, path))
            etag = reply.headers.get("etag")
            assert takes(said, "If-None-Match") == (etag is not None), path
            if etag is not None:
                assert victim.client.get(of(victim, path), headers={"If-None-Match": etag}).status_code == 304


def test_a_change_says_whether_it_may_name_the_state_that_it_was_decided_on(service: Service, victim: Owner) -> None:
    changes = [operation for operation in operations(service) if operation[0] != "GET" and "{" in operation[1]]
    for method, path, said in sorted(changes, key=lambda change: not takes(change[2], "If-Match")):
        body = {"metadata": {}} if method == "PATCH" else None
        reply = victim.client.request(method, of(victim, path), json=body, headers={"If-Match": '"another"'})
        assert takes(said, "If-Match") == (reply.status_code == 412), (method, path)


def test_images_say_that_they_may_be_streamed_awaited_and_late(service: Service) -> None:
    said = {(method, path): said for method, path, said in operations(service)}
    drawing = said["POST", "/v1/images/generations"]
    assert [key for key in said if takes(said[key], "Prefer")] == [("POST", "/v1/images/generations")]
    assert {"200", "202", "503", "504"} <= drawing["responses"].keys()
    assert drawing["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    events = [key for key in said if takes(said[key], "Last-Event-ID")]
    assert events == [("GET", "/v1/fine_tuning/jobs/{job_id}/events")]


def test_every_reference_leads_somewhere(service: Service) -> None:
    document = service.app.openapi()

    def references(part: Any) -> Iterator[str]:
        for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from references(value)
        if isinstance(part, dict) and isinstance(part.get("$ref"), str):
            yield part["$ref"]

    for reference in set(references(document)):
        place = document
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]


# --- hyperparameters: what is said of each, held against what `resolve` takes

LATER = {"image_size"}  # its bounds are the base's
TOGETHER = {"devices": {"batch_size": 256}}


@pytest.fixture
def said_of(service: Service) -> dict[str, Any]:
    """A name's schema, without the `auto` and null that every one takes."""
    shapes = service.app.openapi()["components"]["schemas"]
    assert shapes["DiffFitMethod"]["properties"]["hyperparameters"]["$ref"] == "#/components/schemas/Hyperparameters"
    assert shapes["Hyperparameters"]["additionalProperties"] is False
    said = {}
    for name, schema in shapes["Hyperparameters"]["properties"].items():
        said[name], *chosen = schema["anyOf"]
        assert chosen == [{"const": "auto"}, {"type": "null"}]
    return said


def is_taken(service: Service, name: str, value: Any) -> bool:
    """By `resolve`, whose refusal is of this very field."""
    asked = {**TOGETHER.get(name, {}), name: value}
    try:
        resolve(asked, images=32, classes=2, base=base_of(service.catalog), seed=0, max_steps=10**9)
    except Invalid as error:
        if error.pointer != f"{POINTER}/{name}":
            raise
        return False
    return True


def test_every_hyperparameter_is_said_and_no_other(service: Service, said_of: dict[str, Any]) -> None:
    assert said_of.keys() == NAMES
    for name in said_of:
        assert is_taken(service, name, "auto")
        assert is_taken(service, name, None)
        assert not is_taken(service, name, {})


def test_the_bounds_that_are_said_are_those_that_hold(service: Service, said_of: dict[str, Any]) -> None:
    bounded = {name: said for name, said in said_of.items() if "minimum" in said}
    assert len(bounded) == 20
    for name, said in bounded.items():
        beyond = 1 if said["type"] == "integer" else 1e-9
        number = int if said["type"] == "integer" else float
        assert is_taken(service, name, number(said["minimum"])) or name in LATER
        assert not is_taken(service, name, number(said["minimum"]) - beyond), name
        if "maximum" in said:
            assert is_taken(service, name, number(said["maximum"])), name
            assert not is_taken(service, name, number(said["maximum"]) + beyond), name


def test_the_words_that_are_said_are_those_that_hold(service: Service, said_of: dict[str, Any]) -> None:
    words = {name: said["enum"] for name, said in said_of.items() if "enum" in said}
    words["gamma_depth"] = said_of["gamma_depth"]["anyOf"][0]["enum"]
    assert words.keys() == {"layout", "class_start", "gamma_depth"}
    for name, among in words.items():
        assert all(is_taken(service, name, word) for word in among)
        assert not is_taken(service, name, "another")
    assert is_taken(service, "gamma_places", said_of["gamma_places"]["items"]["enum"])
    assert is_taken(service, "gamma_depth", [0, 2])
    assert not is_taken(service, "gamma_depth", [0, 1, 2])
    assert is_taken(service, "flip", True)
