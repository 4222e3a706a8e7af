"""The OpenAPI document: FastAPI's own, with what holds for every route put in, the problem shape and the headers."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.events import EVENT_STREAM
from api.once import MAX_KEY
from api.schemas.base import Problem, problems

_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}

_HEADERS: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {
        "description": "Makes it safe to send again: the same request gets the reply that it got before.",
        "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY, "pattern": "^[ -~]+$"},
    },
    "If-Match": {
        "description": "The ETag of the state that this was decided on: 412 where it has moved on.",
        "schema": {"type": "string"},
    },
    "If-None-Match": {
        "description": "The ETag of what is there already: 304 where it is that still.",
        "schema": {"type": "string"},
    },
    "Prefer": {
        "description": "`respond-async` answers 202 at once, with a Location to look at.",
        "schema": {"type": "string"},
    },
    "Last-Event-ID": {
        "description": "Of the last event that was seen: a stream goes on after it.",
        "schema": {"type": "string"},
    },
}


def document(app: FastAPI) -> dict[str, Any]:
    """Made once; FastAPI's 422 shape, which is not ours, is taken out."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = schema.setdefault("components", {})
    shapes = components.setdefault("schemas", {})
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    shapes |= problem.pop("$defs") | {"Problem": problem}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    components["parameters"] = {name: {"name": name, "in": "header", **said} for name, said in _HEADERS.items()}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            _complete(path, method, operation)
    shapes.pop("HTTPValidationError", None)
    shapes.pop("ValidationError", None)
    app.openapi_schema = schema
    return schema


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    replies = operation["responses"]
    if path.startswith("/v1/"):
        operation["security"] = [{"key": []}]
    if "422" in replies:
        replies["422"]["content"] = _PROBLEM
    if method == "post":  # what an Idempotency-Key may be answered with
        for status, reply in problems(400, 409, 422).items():
            replies.setdefault(str(status), reply)
    if headers := [{"$ref": f"#/components/parameters/{name}"} for name in _headers(method, replies)]:
        operation["parameters"] = operation.get("parameters", []) + headers


def _headers(method: str, replies: dict[str, Any]) -> Iterator[str]:
    """Those that an operation honours: what it may answer tells."""
    if method == "post":
        yield "Idempotency-Key"
    if "412" in replies:
        yield "If-Match"
    if "304" in replies:
        yield "If-None-Match"
    if "202" in replies:
        yield "Prefer"
    if method == "get" and EVENT_STREAM in replies["200"].get("content", {}):
        yield "Last-Event-ID"
