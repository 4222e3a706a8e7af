"""Bytes of the object store as replies: streamed, with the digest as entity tag."""

from collections.abc import Iterator
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


def object_reply(
    request: Request, store: ObjectStore, key: str, *, digest: str, size: int | None, media_type: str, filename: str
) -> Response:
    """The object, its head, or 304. Raises ObjectMissing before anything is sent."""
    headers = {"ETag": etag_of(digest), "Content-Disposition": _disposition(filename)}
    if is_known(request, etag_of(digest)):
        return Response(status_code=304, headers=headers)
    if size is not None:
        headers["Content-Length"] = str(size)
    if request.method == "HEAD":
        return Response(media_type=media_type, headers=headers)
    return StreamingResponse(_opened(store, key), media_type=media_type, headers=headers)


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
