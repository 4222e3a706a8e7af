"""What goes wrong on the way to the service, each with a message that fits a line."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx


class ClientError(Exception):
    """Expected trouble: the message says what, and where it can what to do."""

    exit_code = 1
    is_passing = False
    """Whether the same call may go well in a moment."""
    retry_after: float | None = None
    """Seconds that the service asks to be left alone for."""


class Unreachable(ClientError):
    """Nobody answers, or not in time."""

    exit_code = 3
    is_passing = True

    def __init__(self, base_url: str, reason: str) -> None:
        super().__init__(f"no answer from {base_url} ({reason}): start it with `difffit up`, or set DIFFFIT_URL")
        self.base_url = base_url


class StillUnderWay(ClientError):
    """What was waited for goes on, but the time given for it is over."""


@dataclass(frozen=True)
class FieldError:
    """One field at fault; `pointer` is a JSON pointer into the request's body."""

    pointer: str
    detail: str


class ApiError(ClientError):
    """The service's answer, read from `application/problem+json` (or from OpenAI's `error` member)."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        errors: tuple[FieldError, ...] = (),
        retry_after: float | None = None,
        body: dict[str, Any] | None = None,
        location: str | None = None,
    ) -> None:
        super().__init__(status, code, detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = errors
        self.retry_after = retry_after
        self.is_passing = status in (429, 503)
        self.body = body or {}
        self.location = location
        """Where what was asked for will be, if the service says that it goes on."""

    def __str__(self) -> str:
        fields = [f"{item.pointer}: {item.detail}" for item in self.errors if item.detail not in self.detail]
        if not fields and len(self.errors) == 1 and self.errors[0].pointer.strip("/") not in self.detail:
            fields = [f"field {self.errors[0].pointer}"]
        tail = f" ({'; '.join(fields)})" if fields else ""
        status = f"{self.status} " if self.status >= 400 else ""
        return f"{self.detail}{tail} [{status}{self.code}]"

    @classmethod
    def from_response(cls, response: httpx.Response) -> "ApiError":
        """Read a reply of status 400 and up, whose body has been read; a body that is no problem is quoted in short."""
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            text = " ".join(response.text.split())[:200] or response.reason_phrase
            return cls(response.status_code, "http_error", text, retry_after=_retry_after(response))
        error, listed = body.get("error"), body.get("errors")
        error = error if isinstance(error, dict) else {}
        return cls(
            status=response.status_code,
            code=str(error.get("code") or body.get("code") or body.get("title") or "http_error"),
            detail=str(body.get("detail") or error.get("message") or body.get("title") or response.reason_phrase),
            errors=tuple(
                FieldError(str(item.get("pointer", "")), str(item.get("detail", "")))
                for item in (listed if isinstance(listed, list) else [])
                if isinstance(item, dict)
            ),
            retry_after=_retry_after(response),
            body=body,
            location=response.headers.get("location"),
        )

    @classmethod
    def from_error(cls, error: Mapping[str, Any]) -> "ApiError":
        """Read the `error` of a stream or of work that was taken: status 200, for it began before it went wrong."""
        message, param = str(error.get("message") or "the service names no reason"), error.get("param")
        fields = (FieldError(f"/{param}", message),) if param else ()
        return cls(200, str(error.get("code") or "stream_error"), message, fields)


def trouble_of(error: Mapping[str, Any] | None) -> str | None:
    """Why work failed, in a line: its `error` as replies have it."""
    return f"{error['message']} [{error['code']}]" if error else None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds; the date form of the header is not used by the service."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
