"""Bytes of the object store as replies: streamed, with the digest as entity tag."""

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from core.storage.base import ObjectStore


def etag_of(digest: str) -> str:
    return f'"{digest}"'


def is_known(request: Request, etag: str) -> bool:
    """Whether If-None-Match says that the caller has it."""
    given = request.headers.get("if-none-match", "")
    return any(tag.strip() in ("*", etag, f"W/{etag}") for tag in given.split(","))


@dataclass(frozen=True)
class Stored:
    """An object as its row knows it, and the name that a caller may save it under."""

    key: str
    sha256: str
    size: int
    filename: str
    media_type: str = "application/octet-stream"


def object_reply(request: Request, store: ObjectStore, stored: Stored) -> Response:
    """The object, its head, or 304. Raises ObjectMissing before anything is sent. Called with no transaction open."""
    headers = {"ETag": etag_of(stored.sha256), "Content-Disposition": _disposition(stored.filename)}
    if is_known(request, etag_of(stored.sha256)):
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(stored.size)
    if request.method == "HEAD":
        return Response(media_type=stored.media_type, headers=headers)
    return StreamingResponse(_opened(store, stored.key), media_type=stored.media_type, headers=headers)


def _opened(store: ObjectStore, key: str) -> Iterator[bytes]:
    """The first chunk is asked for here: an object that is missing is said as such."""
    chunks = iter(store.stream(key))
    first = next(chunks, b"")

    def all_chunks() -> Iterator[bytes]:
        yield first
        yield from chunks

    return all_chunks()


def _disposition(filename: str) -> str:
    """RFC 6266: an ASCII name for the old, the true one for the others; nothing in it can end the header."""
    plain = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in filename
    )
    return f"attachment; filename=\"{plain or 'download'}\"; filename*=UTF-8''{quote(filename, safe='')}"
