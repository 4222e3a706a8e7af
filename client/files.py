"""Files: archives of images to train on."""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.archive import as_archive
from client.patience import wait
from client.transport import Transport

Told = Callable[[int, int], None]
"""Called with (bytes sent, bytes in all) while an upload runs."""

_UPLOAD_SECONDS = 600.0
LONGEST_WAIT = 3600.0  # validation may take half an hour, and as long again until it is a file's turn


@dataclass(frozen=True)
class File:
    """An uploaded archive. `classes` maps a class's name to its images, in label order; empty until validated."""

    id: str
    filename: str
    bytes: int
    sha256: str | None
    status: str  # uploaded | processed | error
    status_details: str | None
    created_at: int
    images: int | None
    rejected: int | None
    classes: Mapping[str, int]
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "File":
        dataset = data.get("dataset") or {}
        return cls(
            id=data["id"],
            filename=data["filename"],
            bytes=data["bytes"],
            sha256=data.get("sha256"),
            status=data["status"],
            status_details=data.get("status_details"),
            created_at=data["created_at"],
            images=dataset.get("images"),
            rejected=dataset.get("rejected"),
            classes={item["name"]: item["count"] for item in dataset.get("classes") or []},
            raw=data,
        )


class Files:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def push(self, path: str | Path, told: Told | None = None) -> File:
        """Upload an archive, or a folder (zipped on the way, the same folder to the same bytes), as a stream."""
        with as_archive(Path(path)) as archive:
            opened: list[_Told] = []

            def parts() -> dict[str, Any]:
                while opened:
                    opened.pop().close()
                opened.append(_Told(archive, told))
                kind = "application/zip" if archive.suffix == ".zip" else "application/octet-stream"
                return {"data": {"purpose": "fine-tune"}, "files": {"file": (archive.name, opened[0], kind)}}

            try:
                reply = self._transport.send("POST", "/v1/files", parts=parts, timeout=_UPLOAD_SECONDS)
            finally:
                while opened:
                    opened.pop().close()
        return File.from_json(reply.json())

    def list(self, limit: int | None = None) -> Iterator[File]:
        """Newest first."""
        return (File.from_json(item) for item in self._transport.page("/v1/files", limit=limit))

    def get(self, file_id: str) -> File:
        return File.from_json(self._transport.get(f"/v1/files/{file_id}"))

    def report(self, file_id: str) -> dict[str, Any]:
        """Validation's outcome, with a verdict an image."""
        return self._transport.get(f"/v1/files/{file_id}/report")

    def content(self, file_id: str) -> bytes:
        return self._transport.read(f"/v1/files/{file_id}/content")

    def delete(self, file_id: str) -> None:
        self._transport.delete(f"/v1/files/{file_id}")

    def wait(self, file_id: str, timeout: float = LONGEST_WAIT) -> File:
        """Until validation has spoken, for or against. Raises StillUnderWay after `timeout` seconds."""
        return wait(
            lambda: self.get(file_id),
            lambda file: file.status != "uploaded",
            lambda file: f"file {file.id} is still being validated",
            timeout,
            every_seconds=0.2,
        )


class _Told(io.FileIO):
    """A file that tells how far it has been read."""

    def __init__(self, path: Path, told: Told | None) -> None:
        super().__init__(path)
        self._told = told
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(-1 if size is None else size) or b""
        if self._told is not None:
            self._told(self.tell(), self._size)
        return chunk
