"""Bytes by key. Keys are made by `core.storage.keys` alone, never from user text."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from core.errors import DomainError, Unavailable


class ObjectMissing(DomainError):
    """The database names an object that the store does not have. Its message may be shown; `key` is for the log."""

    code = "object_missing"

    def __init__(
        self,
        message: str = "its bytes are not in the object store any more",
        *,
        key: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.key = key


class CorruptObject(DomainError):
    """The store gave other bytes than the database names."""

    code = "object_corrupt"


class StorageUnavailable(Unavailable):
    code = "storage_unavailable"


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    size: int
    modified_at: datetime


class ObjectStore(Protocol):
    """Writes are atomic and repeatable: an object is there whole or not at all."""

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None: ...

    def put_file(self, key: str, path: Path, content_type: str = "application/octet-stream") -> None: ...

    def get(self, key: str) -> bytes:
        """Raises ObjectMissing."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Writes the object to `path`. Raises ObjectMissing, and StorageUnavailable where the disk is full, too."""
        ...

    def stream(self, key: str, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
        """The object in chunks. Raises ObjectMissing before the first."""
        ...

    def delete(self, key: str) -> None:
        """Deleting what is not there is no error."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]: ...

    def clear_leftovers(self) -> int:
        """Remove what killed writers began and will not finish; how much it was. A store that cannot tell has none."""
        ...

    def ping(self) -> None:
        """Raises StorageUnavailable."""
        ...
