"""What happens before a route and around it: who asks, how much they send, what every reply carries.

Pure ASGI: all of this is decided before a byte of the body is read.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from anyio import to_thread
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import (
    Malformed,
    Refusal,
    TooLarge,
    TooSlow,
    UnsupportedMedia,
    domain_problem,
    unavailable,
    unexpected,
)
from api.rates import Allowance
from core.db.session import Database
from core.errors import DomainError, Invalid, NotFound
from core.settings import Settings
from core.tenants import service as tenants
from core.tenants.service import Unauthenticated

log = structlog.get_logger()

CALLER = "difffit.caller"
ALLOWANCE = "difffit.allowance"
DOCS_ASSETS = "/docs/assets"
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect"}) | {
    f"{DOCS_ASSETS}/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
}
MAX_HEADERS = 32 * 1024  # the server's own limit of 64 KiB holds only for what comes in several pieces
UPLOAD_PATH = "/v1/files"
UPLOAD_SLACK = 64 * 1024  # what multipart adds to a file

_HUNG_UP = 499  # nobody is there to be answered: for log and metrics, as nginx has it
_KEY = re.compile(r"Bearer (dfk_[A-Za-z0-9_-]{1,128})")


@dataclass(frozen=True)
class Caller:
    """Whose key a request came with."""

    tenant_id: str


class Surroundings:
    """Outermost: a request id, headers that every reply carries, one line of log, and no traceback to the caller."""

    def __init__(self, app: ASGIApp, api: FastAPI) -> None:
        self._app = app
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started, status = f"req-{secrets.token_hex(16)}", time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers.setdefault("cache-control", "private, no-store")
                allowance: Allowance | None = scope.get(ALLOWANCE)
                headers.update(allowance.fields() if allowance else {})
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_headers)
            except ClientDisconnect:
                status = status or _HUNG_UP
            except Exception:
                log.exception("http.failed", method=scope["method"], path=scope["path"])
                if not status:
                    await unexpected(scope["path"])(scope, receive, send_with_headers)
            finally:
                self._tell(scope, status, time.perf_counter() - started)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        caller: Caller | None = scope.get(CALLER)
        self._api.state.metrics.answered(scope["method"], route, status, seconds)
        log.info(
            "http.answered",
            method=scope["method"],
            path=scope["path"],
            route=route,
            status=status,
            ms=round(seconds * 1000, 1),
            tenant_id=caller.tenant_id if caller else None,
        )


class Authentication:
    """No key, no reading: the reply is sent with the body still on the wire. The database is asked every time, so
    that a revoked key is dead at once. A tenant that asks too often gets no further either."""

    def __init__(self, app: ASGIApp, api: FastAPI) -> None:
        self._app = app
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            scope[CALLER] = await to_thread.run_sync(_caller, self._api.state.database, _secret(Headers(scope=scope)))
            scope[ALLOWANCE] = self._api.state.buckets.take(scope[CALLER].tenant_id)
            scope[ALLOWANCE].check()
        except DomainError as error:
            await _refuse(domain_problem(error, scope["path"]), scope, receive, send)
            return
        except SQLAlchemyError as error:
            log.warning("database.unavailable", error=type(error).__name__)
            await _refuse(unavailable(scope["path"]), scope, receive, send)
            return
        with structlog.contextvars.bound_contextvars(tenant_id=scope[CALLER].tenant_id):
            await self._app(scope, receive, send)


class Limits:
    """Sizes, speeds and encodings of what comes in."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        *,
        idle_seconds: float = 30.0,
        grace_seconds: float = 60.0,
        bytes_per_second: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._settings = settings
        self._idle_seconds = idle_seconds
        self._grace_seconds = grace_seconds
        self._bytes_per_second = bytes_per_second
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        cap = self._cap(scope)
        try:
            self._check(scope, cap)
        except DomainError as error:
            await _refuse(domain_problem(error, scope["path"]), scope, receive, send)
            return
        await self._app(scope, self._capped(receive, cap), send)

    def _cap(self, scope: Scope) -> int:
        is_upload = scope["method"] == "POST" and scope["path"] == UPLOAD_PATH
        return self._settings.max_upload_bytes + UPLOAD_SLACK if is_upload else self._settings.max_body_bytes

    def _check(self, scope: Scope, cap: int) -> None:
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADERS:
            raise Malformed(f"the headers are larger than {MAX_HEADERS} bytes together")
        if "\x00" in scope["path"]:
            raise NotFound("no such path", code="route_not_found")
        if "%00" in scope["query_string"].decode("latin-1"):
            raise Invalid("the query holds a NUL character")
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise UnsupportedMedia("encoded bodies are not decoded: send the body without Content-Encoding")
        lengths = headers.getlist("content-length")
        if len(lengths) > 1 or any(not re.fullmatch(r"[0-9]{1,18}", length) for length in lengths):
            raise Malformed("Content-Length is not one whole number")
        has_body = bool(lengths and int(lengths[0])) or "transfer-encoding" in headers
        if lengths and int(lengths[0]) > cap:
            raise TooLarge(_too_large(cap))
        if has_body and scope["method"] in ("POST", "PATCH", "PUT"):
            _check_type(headers.get("content-type", ""), scope["path"] == UPLOAD_PATH)

    def _capped(self, receive: Receive, cap: int) -> Receive:
        count, is_over, started = 0, False, self._clock()

        async def receive_capped() -> Message:
            nonlocal count, is_over
            if is_over:
                return await receive()  # only a disconnect can come now
            try:
                message = await asyncio.wait_for(receive(), self._idle_seconds)
            except TimeoutError:
                raise Refusal(TooSlow(f"no byte of the body came for {self._idle_seconds:g} s")) from None
            is_over = message["type"] != "http.request" or not message.get("more_body", False)
            count += len(message.get("body", b""))
            if count > cap:
                raise Refusal(TooLarge(_too_large(cap)))
            if not is_over and self._clock() - started > self._grace_seconds + count / self._bytes_per_second:
                raise Refusal(TooSlow(f"the body came slower than {self._bytes_per_second} bytes a second"))
            return message

        return receive_capped


def _secret(headers: Headers) -> str:
    """The one key of the one Authorization header, in the one form that is documented."""
    given = headers.getlist("authorization")
    found = _KEY.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        raise Unauthenticated("send one header 'Authorization: Bearer dfk_…' with a live API key")
    return found[1]


def _caller(database: Database, secret: str) -> Caller:
    with database.read() as session:
        tenant = tenants.authenticate(session, secret)
        return Caller(tenant.id)


def _check_type(content_type: str, is_upload: bool) -> None:
    kind = content_type.split(";", 1)[0].strip().lower()
    wanted = "multipart/form-data" if is_upload else "application/json"
    if kind != wanted:
        raise UnsupportedMedia(f"the body must be {wanted}")


def _too_large(cap: int) -> str:
    return f"the body is larger than the {cap} bytes that this route takes"


async def _refuse(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """The body is left unread, so the connection cannot be used again."""
    response.headers["connection"] = "close"
    await response(scope, receive, send)
