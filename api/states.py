"""ETag and If-Match (RFC 9110): a change can name the state that it was decided on."""

import hashlib

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from api.content import etag_of, is_known
from api.errors import PreconditionFailed


def state_of(shape: BaseModel) -> str:
    """Two digests: of what a decision rests on, and of all that is shown.

    A shape names in `PASSING` what others or the mere time change, as a place in a queue.
    """
    passing: frozenset[str] = getattr(shape, "PASSING", frozenset())
    return etag_of(f"{_digest(shape.model_dump_json(exclude=set(passing)))}-{_digest(shape.model_dump_json())}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def check_state(request: Request, present: BaseModel) -> None:
    """Raises PreconditionFailed when the caller decided on a state that has passed."""
    given = request.headers.get("if-match")
    if given is None or given.strip() == "*":
        return
    decided = state_of(present).partition("-")[0]
    if decided not in [tag.strip().partition("-")[0] for tag in given.split(",")]:
        raise PreconditionFailed("it has changed since: read it again, then decide")


def state_reply(request: Request, shape: BaseModel) -> JSONResponse:
    """The shape with its ETag, or 304 for who reads what it has already."""
    etag = state_of(shape)
    if request.method in ("GET", "HEAD") and is_known(request, etag):
        return _NotModified(None, 304, headers={"ETag": etag})
    return JSONResponse(shape.model_dump(mode="json"), headers={"ETag": etag})


class _NotModified(JSONResponse):
    def render(self, content: object) -> bytes:
        return b""
