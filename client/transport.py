"""HTTP with the manners that every call shares: the key, retries that are safe, errors as `ApiError`."""

import math
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from json import loads
from typing import Any

import httpx

from client.config import is_local
from client.errors import ApiError, ClientError, Unreachable

_LONGEST_WAIT_SECONDS = 60.0

Body = Mapping[str, Any]


class Transport:
    """One service, one key. A request is repeated on 429, 503 and a broken connection: always safe here.

    GET and DELETE may be repeated as they are, and a PATCH, which replaces; a POST carries an `Idempotency-Key`, the
    same one each time. A stream of images has none: it is repeated on 429 alone.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._retries = retries
        self._sleep = sleep
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ClientError("the API key holds characters that no key has: copy it again, without line ends")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self.base_url,
            headers={"User-Agent": "difffit-client", **headers},
            timeout=httpx.Timeout(timeout, connect=5.0),
            # a proxy from the environment would be asked for the service on this very machine
            trust_env=not is_local(self.base_url),
        )

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        return _object(
            self.send("GET", path, params={key: value for key, value in params.items() if value is not None})
        )

    def post(self, path: str, body: Body | None = None, *, timeout: float | None = None) -> dict[str, Any]:
        return _object(self.send("POST", path, json=None if body is None else dict(body), timeout=timeout))

    def patch(self, path: str, body: Body) -> dict[str, Any]:
        return _object(self.send("PATCH", path, json=dict(body)))

    def delete(self, path: str) -> None:
        self.send("DELETE", path)

    def read(self, path: str) -> bytes:
        """The bytes of a small object: an image, an adapter."""
        return self.send("GET", path).content

    def page(self, path: str, *, limit: int | None = None, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, newest first, page after page; `limit` ends it early."""
        left = limit
        while left is None or left > 0:
            reply = self.get(path, limit=min(left or 100, 100), **params)
            yield from reply["data"]
            left = None if left is None else left - len(reply["data"])
            if not reply.get("has_more") or not reply["data"]:
                return
            params["after"] = reply.get("last_id") or reply["data"][-1]["id"]

    def send(
        self,
        method: str,
        path: str,
        *,
        params: Body | None = None,
        json: Any = None,
        parts: Callable[[], Mapping[str, Any]] | None = None,
        timeout: float | None = None,
    ) -> httpx.Response:
        """One request, repeated where that is safe. `parts` gives the multipart fields anew for every attempt.

        A 404 to a DELETE that is repeated is an answer too: what an earlier attempt may have deleted is gone. Raises
        ApiError or Unreachable; ClientError for a body that JSON cannot carry.
        """
        _require_finite(json)
        headers = {"Idempotency-Key": str(uuid.uuid4())} if method == "POST" else {}
        more: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        may_be_done = False
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            try:
                fields = parts() if parts else {}
                response = self._http.request(method, path, params=params, json=json, headers=headers, **fields, **more)
            except httpx.TransportError as error:
                if last or not _may_repeat(error):
                    raise Unreachable(self.base_url, _reason(error)) from error
                may_be_done = may_be_done or _was_sent(error)
                self.pause(attempt)
                continue
            if response.is_success or (method == "DELETE" and response.status_code == 404 and may_be_done):
                return response
            error = ApiError.from_response(response)
            if last or not _is_passing(error, response):
                raise error
            may_be_done = may_be_done or error.status == 503  # the database may have gone away after the commit
            self.pause(attempt, error.retry_after)
        raise AssertionError("the last attempt returns or raises")

    def pause(self, attempt: int, retry_after: float | None = None) -> None:
        """Before a call is repeated: as long as the service asks for, else 0.25, 0.5, 1, 2, … s with some jitter."""
        seconds = 0.25 * 2**attempt * random.uniform(0.8, 1.2)  # noqa: S311 - jitter, no secret
        self._sleep(seconds if retry_after is None else min(retry_after, _LONGEST_WAIT_SECONDS))

    def events(
        self, method: str, path: str, *, json: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[tuple[str | None, dict[str, Any]]]:
        """(id, data) of each server-sent event as it comes. Repeated on 429 alone, after which nothing has begun.

        Raises as `send` does, Unreachable also where the connection breaks before the stream has ended.
        """
        _require_finite(json)
        headers = {"Accept": "text/event-stream", **(headers or {})}
        has_begun = False
        for attempt in range(self._retries + 1):
            try:
                with self._http.stream(method, path, json=json, headers=headers) as response:
                    if response.is_success:
                        has_begun = True
                        yield from _server_sent(response.iter_lines())
                        return
                    response.read()
            except httpx.TransportError as error:
                reason = f"the stream ended early: {_reason(error)}" if has_begun else _reason(error)
                raise Unreachable(self.base_url, reason) from error
            error = ApiError.from_response(response)
            if error.status != 429 or attempt == self._retries:
                raise error
            self.pause(attempt, error.retry_after)


def _require_finite(value: Any, name: str = "") -> None:
    """JSON has no NaN and no infinity: the field is named before anything is sent. Raises ClientError."""
    inside: Iterable[tuple[Any, Any]] = ()
    match value:
        case float() if not math.isfinite(value):
            raise ClientError(f"{name} is {value}: it must be a finite number")
        case Mapping():
            inside = value.items()
        case list() | tuple():
            inside = enumerate(value)
    for key, item in inside:
        _require_finite(item, f"{name}.{key}" if name else str(key))


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ApiError(response.status_code, "not_json", f"{response.url} did not answer with a JSON object")
    return body


def _server_sent(lines: Iterator[str]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """(id, data) of each server-sent event whose data is a JSON object; comments and pings are passed over."""
    number: str | None = None
    data: list[str] = []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            number = value
        elif name == "data":
            data.append(value)
        elif line == "" and data:
            body = "\n".join(data)
            data = []
            if body.startswith("{"):
                yield number, loads(body)


def _may_repeat(error: httpx.TransportError) -> bool:
    """A read that timed out is not worth a second wait as long; a connection that broke is."""
    return not isinstance(error, httpx.ReadTimeout | httpx.UnsupportedProtocol)


def _was_sent(error: httpx.TransportError) -> bool:
    """Whether the service may have had the request, and acted on it."""
    return not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)


def _is_passing(error: ApiError, response: httpx.Response) -> bool:
    """429 and 503 pass; so does a 409 that says when to ask again: an earlier attempt of ours is under way, say."""
    if response.headers.get("x-should-retry") == "false":
        return False
    return error.is_passing or (error.status == 409 and "retry-after" in response.headers)


def _reason(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.ConnectError):
        return "connection refused" if "refused" in str(error).lower() else f"cannot connect: {error}"
    if isinstance(error, httpx.TimeoutException):
        return "no reply in time"
    return str(error) or type(error).__name__
