"""Trouble, translated once: every error is a problem document (RFC 9457) that OpenAI's clients understand as well."""

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi import HTTPException as RouteException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import ProgrammingError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from core.db.session import DATABASE_AWAY, is_not_migrated
from core.errors import Conflict, DomainError, Invalid, NotFound, OverQuota, Unavailable, param_of
from core.storage.base import ObjectMissing
from core.tenants.service import Suspended, Unauthenticated

log = structlog.get_logger()


class Malformed(DomainError):
    """The request cannot be parsed."""

    code = "malformed_request"


class TooLarge(DomainError):
    code = "body_too_large"


class TooSlow(DomainError):
    code = "body_too_slow"


class HeadersTooSlow(TooSlow):
    code = "headers_too_slow"


class UnsupportedMedia(DomainError):
    code = "unsupported_media_type"


class PreconditionFailed(DomainError):
    """If-Match names a state that is not the present one."""

    code = "precondition_failed"


class InFlight(Conflict):
    """The same request is under way."""

    code = "idempotency_in_flight"
    retry_after_seconds = 1


class StillDrawing(Unavailable):
    """The wait is over, the work is not: `location` tells where its result will be."""

    code = "image_not_ready"

    def __init__(self, message: str, location: str) -> None:
        super().__init__(message)
        self.location = location


class GivenUp(Unavailable):
    """The service could not do it, and has tried: the same call would only bring it on once more."""

    retry_after_seconds = None


class TimedOut(DomainError):
    """The request's own timeout has passed."""

    code = "deadline_exceeded"


class Refusal(RouteException):
    """A DomainError on its way through FastAPI's body reading, which lets only HTTPExceptions pass as they are."""

    def __init__(self, error: DomainError) -> None:
        super().__init__(_status_of(error), str(error))
        self.error = error


STATUS: dict[type[DomainError], int] = {
    Malformed: 400,
    Unauthenticated: 401,
    Suspended: 403,
    NotFound: 404,
    TooSlow: 408,
    Conflict: 409,
    ObjectMissing: 410,
    PreconditionFailed: 412,
    TooLarge: 413,
    UnsupportedMedia: 415,
    Invalid: 422,
    OverQuota: 429,
    Unavailable: 503,
    TimedOut: 504,
}

_CODES = {404: "route_not_found", 405: "method_not_allowed", 400: "malformed_request", 413: "body_too_large"}

_MISSING = object()

PROBLEM_TYPE = "application/problem+json"


class ProblemResponse(JSONResponse):
    media_type = PROBLEM_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()  # ASCII: whatever a caller sent can be shown


def problem(
    status: int,
    code: str,
    detail: str,
    instance: str,
    *,
    errors: Sequence[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> ProblemResponse:
    """`errors` holds a JSON pointer and a sentence per field at fault; the first is OpenAI's `param`."""
    body = {
        "type": f"urn:difffit:error:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": instance,
        "errors": list(errors),
        "error": {
            "code": code,
            "message": detail,
            "param": param_of(errors[0]["pointer"]) if errors else None,
            "type": _openai_type(status),
        },
    }
    return ProblemResponse(body, status, headers=dict(headers or {}))


def domain_problem(error: DomainError, instance: str) -> ProblemResponse:
    errors = [{"pointer": error.pointer, "detail": str(error)}] if error.pointer else []
    status = _status_of(error)
    return problem(status, error.code, str(error), instance, errors=errors, headers=_headers_of(error))


def unavailable(instance: str) -> ProblemResponse:
    """The database does not answer."""
    error = Unavailable("the database does not answer now: ask again", code="database_unavailable")
    return domain_problem(error, instance)


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(DomainError)
    async def _domain(request: Request, error: DomainError) -> Response:
        if isinstance(error, ObjectMissing) and error.key is not None:
            log.error("object.missing", key=error.key)
        return domain_problem(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        return _validation_problem(error, request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Refusal):
            return domain_problem(error.error, request.url.path)
        return _http_problem(error, request)

    async def _database(request: Request, error: Exception) -> Response:
        log.warning("database.unavailable", error=type(error).__name__)
        return unavailable(request.url.path)

    @app.exception_handler(ProgrammingError)
    async def _schema(request: Request, error: ProgrammingError) -> Response:
        if not is_not_migrated(error):
            raise error
        return await _database(request, error)

    for kind in DATABASE_AWAY:
        app.add_exception_handler(kind, _database)


def unexpected(instance: str) -> ProblemResponse:
    detail = "something went wrong on our side; x-request-id names it in our logs"
    return problem(500, "internal_error", detail, instance)


def _status_of(error: DomainError) -> int:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def _headers_of(error: DomainError) -> dict[str, str]:
    if isinstance(error, Unauthenticated):
        return {"WWW-Authenticate": "Bearer"}
    if error.retry_after_seconds is not None:
        headers = {"Retry-After": str(error.retry_after_seconds)}
        if isinstance(error, StillDrawing):  # a retry would draw it a second time: look at Location instead
            headers |= {"Location": error.location, "x-should-retry": "false"}
        return headers
    if isinstance(error, (Conflict, TimedOut, GivenUp)):
        return {"x-should-retry": "false"}
    return {}


def _http_problem(error: HTTPException, request: Request) -> ProblemResponse:
    status, headers = error.status_code, dict(error.headers or {})
    code = _CODES.get(status, "http_error")
    detail = str(error.detail)
    if status == 404:
        detail = f"no such route: {request.url.path}; see /docs"
    elif status == 405:
        headers["Allow"] = ", ".join(allowed_methods(request)) or headers.get("Allow", "")
        detail = f"{request.method} is not offered here: {headers['Allow']}"
    elif status == 400:
        detail = "the body cannot be parsed: send JSON in UTF-8, not too deeply nested"
    return problem(status, code, detail, request.url.path, headers=headers)


def allowed_methods(request: Request) -> list[str]:
    """The methods of every route on this path; Starlette would name those of the first alone."""
    routes = request.app.state.routes
    methods: set[str] = set()
    for route in routes:
        if route.path_regex.match(request.url.path):
            methods |= route.methods or set()
    return sorted(methods)


def _validation_problem(error: RequestValidationError, instance: str) -> ProblemResponse:
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        reason = next(item.get("ctx", {}).get("error", "") for item in found if item["type"] == "json_invalid")
        return problem(400, "malformed_json", f"the body is no JSON: {reason}", instance)
    fields = [_field(item, error.body) for item in found]
    errors = list({json.dumps(entry): entry for entry in fields}.values())[:20]
    detail = "; ".join(f"{entry['pointer'] or 'body'}: {entry['detail']}" for entry in errors[:3])
    return problem(422, "invalid", detail, instance, errors=errors)


def _field(item: Mapping[str, Any], body: Any) -> dict[str, str]:
    """One field at fault, what it was never repeated: it may be long or hostile."""
    place, *rest = item["loc"]
    pointer = "".join(f"/{_escaped(str(part))}" for part in _path(rest, body if place == "body" else None))
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "this field is not known here"
    elif item["type"] == "missing":
        message = "this field is required"
    elif item["type"] in ("model_attributes_type", "model_type", "dict_type"):
        message = "send a JSON object"
    if place in ("query", "header"):
        message = f"{message} ({place} parameter)"
    return {"pointer": pointer, "detail": _short(message)}


def _path(location: Sequence[str | int], body: Any) -> list[str | int]:
    """Pydantic names the member of a union that was tried as well; that is no place in the document."""
    path: list[str | int] = []
    for part in location:
        inner = _MISSING
        if isinstance(body, Mapping):
            inner = body.get(part, _MISSING)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            inner = body[part]
        if inner is not _MISSING or not _is_union_tag(str(part)):
            path.append(part)
            body = inner
    return path


def _is_union_tag(part: str) -> bool:
    return (
        re.fullmatch(r"[A-Z]\w+|(int|float|str|bool|list|dict|literal|function|constrained|nullable)\b.*", part)
        is not None
    )


def _escaped(part: str) -> str:
    return part[:100].replace("~", "~0").replace("/", "~1")


def _short(text: str) -> str:
    return text if len(text) <= 500 else text[:500] + "…"


def _openai_type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error"
    )
