"""ETag and If-Match (RFC 9110): a change can name the state that it was decided on."""

import hashlib

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from api.content import etag_of, is_known
from api.errors import PreconditionFailed


def state_of(shape: BaseModel) -> str:
    return etag_of(hashlib.sha256(shape.model_dump_json().encode()).hexdigest()[:32])


def check_state(request: Request, present: BaseModel) -> None:
    """Raises PreconditionFailed when the caller decided on a state that has passed."""
    given = request.headers.get("if-match")
    if given is None or given.strip() == "*":
        return
    if state_of(present) not in [tag.strip() for tag in given.split(",")]:
        raise PreconditionFailed("it has changed since: read it again, then decide")


def state_reply(request: Request, shape: BaseModel) -> JSONResponse:
    """The shape with its ETag, or 304 for who has it."""
    etag = state_of(shape)
    if is_known(request, etag):
        return _NotModified(None, 304, headers={"ETag": etag})
    return JSONResponse(shape.model_dump(mode="json"), headers={"ETag": etag})


class _NotModified(JSONResponse):
    def render(self, content: object) -> bytes:
        return b""
