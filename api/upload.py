"""A multipart upload, streamed to a file under the spool folder: never whole in memory, hashed on the way."""

import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from anyio import to_thread
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from api.errors import Malformed, TooLarge
from core import leftovers
from core.errors import Invalid, Unavailable

MAX_UPLOADS = 8  # of one tenant, at once, in this process
MAX_PARTS = 16
MAX_BOUNDARY = 70  # RFC 2046
MAX_PART_HEADERS = 8 * 1024
MAX_FIELD = 4 * 1024
MAX_FILENAME = 255

_BATCH = 1 << 20


@dataclass(frozen=True)
class Upload:
    """A file in the spool, and the text fields that came with it."""

    path: Path
    filename: str
    size: int
    sha256: str
    fields: dict[str, str]


@asynccontextmanager
async def received(request: Request, spool: Path, max_bytes: int, known: frozenset[str]) -> AsyncIterator[Upload]:
    """The upload, for as long as the block lasts; nothing is left of it after. `known` are the fields allowed."""
    boundary = _boundary(request.headers.get("content-type", ""))
    path = spool / secrets.token_hex(16)
    await to_thread.run_sync(leftovers.clear, spool)  # of processes that were killed in an upload
    try:
        with _opened(path) as file:
            form = _Form(boundary, max_bytes)
            async for chunk in request.stream():
                form.feed(chunk)
                if len(form.waiting) >= _BATCH:
                    await to_thread.run_sync(_write, file, form.taken(), form.digest)
            form.end()
            await to_thread.run_sync(_write, file, form.taken(), form.digest)
        yield form.judged(path, known)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Unbuffered: what a full disk did not take would be written once more at the close, and fail there.
        file = path.open("xb", buffering=0)
    except OSError as error:
        raise _no_room(error) from error
    with file:
        yield file


def _write(file: FileIO, data: bytes, digest: Any) -> None:
    digest.update(data)
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> Unavailable:
    return Unavailable(f"the upload cannot be kept: {os.strerror(error.errno or 0)}", code="spool_unavailable")


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= MAX_BOUNDARY:
        raise Malformed(
            f"send multipart/form-data with a boundary of 1 to {MAX_BOUNDARY} characters", code="malformed_multipart"
        )
    return boundary


@dataclass
class _Part:
    name: str = ""
    filename: str | None = None
    text: bytearray = field(default_factory=bytearray)


class _Form:
    """Fed with bytes; keeps fields, passes the bytes of the first `file` on, counts the rest."""

    def __init__(self, boundary: bytes, max_bytes: int) -> None:
        self.waiting = bytearray()
        self.digest = hashlib.sha256()
        self._max_bytes = max_bytes
        self._size = 0
        self._files: list[str] = []
        self._fields: list[tuple[str, str]] = []
        self._parts = 0
        self._is_complete = False
        self._part = _Part()
        self._header_bytes = 0
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_end": self._on_end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise _malformed("the multipart body cannot be parsed") from error

    def taken(self) -> bytes:
        data = bytes(self.waiting)
        self.waiting.clear()
        return data

    def end(self) -> None:
        if not self._is_complete:
            raise _malformed("the multipart body ends before its closing boundary")

    def judged(self, path: Path, known: frozenset[str]) -> Upload:
        """Raises Invalid where parts are missing, repeated or not known."""
        names = [name for name, _ in self._fields]
        if len(self._files) != 1:
            raise Invalid(f"send exactly one part 'file' with a filename, not {len(self._files)}", pointer="/file")
        for name in names:
            if name not in known:
                raise Invalid("this part is not known here", code="unknown_part", pointer=f"/{name[:100]}")
            if names.count(name) > 1:
                raise Invalid("this part came more than once", pointer=f"/{name}")
        return Upload(path, _basename(self._files[0]), self._size, self.digest.hexdigest(), dict(self._fields))

    # --- what the parser tells ---

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _malformed(f"the multipart body has more than {MAX_PARTS} parts")
        self._part, self._headers, self._header_bytes = _Part(), {}, 0

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._count_header(end - start)

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._count_header(end - start)

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_PART_HEADERS:
            raise _malformed(f"the headers of a part exceed {MAX_PART_HEADERS} bytes")

    def _on_header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise _malformed("a part has no 'Content-Disposition: form-data' with a name")
        self._part.name = options[b"name"].decode("utf-8", "replace")
        if b"filename" in options:
            self._part.filename = options[b"filename"].decode("utf-8", "replace")
            if self._part.name == "file":
                self._files.append(self._part.filename)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.filename is None:
            self._part.text += data[start:end]
            if len(self._part.text) > MAX_FIELD:
                raise _malformed(f"a field exceeds {MAX_FIELD} bytes")
        elif self._part.name == "file" and len(self._files) == 1:
            self._size += end - start
            if self._size > self._max_bytes:
                raise TooLarge(f"the file is larger than {self._max_bytes} bytes")
            self.waiting += data[start:end]

    def _on_part_end(self) -> None:
        if self._part.filename is None or self._part.name != "file":
            self._fields.append((self._part.name, bytes(self._part.text).decode("utf-8", "replace")))

    def _on_end(self) -> None:
        self._is_complete = True


def _malformed(detail: str) -> Malformed:
    return Malformed(detail, code="malformed_multipart")


def _basename(filename: str) -> str:
    """A name to show, never one to open: no folders, no control characters."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    shown = "".join(letter for letter in last if letter.isprintable())
    return shown[:MAX_FILENAME].strip() or "upload"
