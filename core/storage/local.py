"""A folder as object store: the embedded default."""

import io
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG

from core import faults, leftovers
from core.storage.base import ObjectInfo, ObjectMissing, StorageUnavailable

_STAGING = ".staging"
_PUBLISH_TRIES = 100
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # `a` where only `a/b` was put, and the reverse


class LocalStore:
    """Objects are files under `root`; a put is a rename, so that nobody sees half of one."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        staged = self._staged()
        try:
            with staged.open("wb") as file:
                file.write(data)
            self._publish(staged, key)
        except OSError as error:
            raise StorageUnavailable(f"cannot write an object: {error.strerror}") from error
        finally:
            staged.unlink(missing_ok=True)

    def put_file(self, key: str, path: Path, content_type: str = "application/octet-stream") -> None:
        staged = self._staged()
        try:
            with path.open("rb") as source, staged.open("wb") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
                    faults.point("upload_part")
            self._publish(staged, key)
        except OSError as error:
            raise StorageUnavailable(f"cannot write an object: {error.strerror}") from error
        finally:
            staged.unlink(missing_ok=True)

    def get(self, key: str) -> bytes:
        return b"".join(self.stream(key))

    def get_file(self, key: str, path: Path) -> None:
        chunks = self.stream(key)
        try:
            with path.open("wb") as target:
                for chunk in chunks:
                    target.write(chunk)
        except OSError as error:
            raise StorageUnavailable(f"cannot write down an object: {error.strerror}") from error

    def stream(self, key: str, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
        try:
            file = self._path(key).open("rb")
        except _ABSENT as error:
            raise ObjectMissing(key=key) from error
        except OSError as error:
            raise StorageUnavailable(f"cannot read an object: {error.strerror}") from error
        return self._chunks(file, chunk_bytes)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(*_ABSENT):
            path.unlink()
        self._remove_empty(path.parent)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for folder, below, names in os.walk(self._root, onerror=_unless_gone):
            below[:] = sorted(name for name in below if name != _STAGING)
            for path in (Path(folder) / name for name in sorted(names)):
                key = path.relative_to(self._root).as_posix()
                if not key.startswith(prefix):
                    continue
                try:
                    stat = path.stat()
                except FileNotFoundError:  # deleted since the folder was read
                    continue
                if S_ISREG(stat.st_mode):
                    yield ObjectInfo(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def clear_leftovers(self) -> int:
        return leftovers.clear(self._root / _STAGING)

    def ping(self) -> None:
        try:
            (self._root / _STAGING).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageUnavailable(f"cannot write to the object folder: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        path = (self._root / key).resolve()
        if not path.is_relative_to(self._root.resolve()):
            raise ValueError("a key left the store")  # keys are ours: this is a bug, not input
        return path

    def _staged(self) -> Path:
        self.ping()
        return self._root / _STAGING / secrets.token_hex(16)

    def _publish(self, staged: Path, key: str) -> None:
        descriptor = os.open(staged, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        faults.point("object_staged")
        target = self._path(key)
        for tries_left in reversed(range(_PUBLISH_TRIES)):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                staged.replace(target)
                return
            except (FileNotFoundError, FileExistsError):  # `delete` removes folders that are empty, this one just now
                if not tries_left:
                    raise

    def _remove_empty(self, folder: Path) -> None:
        """The folder and those above it, as far as nothing is left in them; the root stays."""
        root = self._root.resolve()
        while folder != root:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # another delete was quicker; what is above may still be ours to remove
            except OSError:
                return
            folder = folder.parent

    @staticmethod
    def _chunks(file: io.BufferedReader, chunk_bytes: int) -> Iterator[bytes]:
        with file:
            while chunk := _read(file, chunk_bytes):
                yield chunk


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, _ABSENT):
        raise StorageUnavailable(f"cannot list objects: {error.strerror}") from error


def _read(file: io.BufferedReader, size: int) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise StorageUnavailable(f"cannot read an object: {error.strerror}") from error
