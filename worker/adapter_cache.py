"""Adapter files on the local disk, by digest: between the object store and the memory of a worker."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import structlog

from core.adapters import format as adapter_format
from core.diffusion.adapter import Adapter
from core.storage import verified
from core.storage.base import CorruptObject, ObjectStore

log = structlog.get_logger()


class AdapterCache:
    """Whoever an adapter's bytes come from, they have its digest. Any thread may load."""

    def __init__(self, folder: Path, store: ObjectStore, max_bytes: int = 4 * 1024**3) -> None:
        self._folder = folder
        self._store = store
        self._max_bytes = max_bytes
        self._unlooked = max_bytes  # bytes written since the folder was looked through: so that the first write looks
        # A file is written behind the load that fetched it: nobody waits for the disk.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="adapter-cache")

    def load(self, digest: str, key: str, fingerprint: str) -> Adapter:
        """From the disk, else from the store under `key`. Raises CorruptObject, and what a store and a file raise."""
        path = self._folder / f"{digest}.safetensors"
        data = _read(path)
        if data is not None and hashlib.sha256(data).hexdigest() == digest:
            return adapter_format.load(data, base_fingerprint=fingerprint)
        try:
            data = verified.get(self._store, key, digest)
        except CorruptObject as error:
            message = "the adapter's bytes differ from what was published"
            raise CorruptObject(message, code="adapter_corrupt") from error
        adapter = adapter_format.load(data, base_fingerprint=fingerprint)
        self._writer.submit(self._keep, path, data)
        return adapter

    def close(self) -> None:
        self._writer.shutdown()

    def _keep(self, path: Path, data: bytes) -> None:
        """A full disk must not fail a request: the cache is only a cache."""
        try:
            _write(path, data)
            self._unlooked += len(data)
            if self._unlooked >= self._max_bytes // 16:  # a look at thousands of files takes a while
                self._unlooked = 0
                _make_room(self._folder, self._max_bytes)
        except OSError as error:
            log.warning("cache.failed", error=error.strerror)


def _read(path: Path) -> bytes | None:
    """The file, from now on the one that was used last; None for one that is not there, or is no more."""
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    return data


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}-{id(data):x}")  # of this process and this write alone
    try:
        staged.write_bytes(data)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _make_room(folder: Path, max_bytes: int) -> None:
    """Remove what was used longest ago until the rest fits; half files of killed processes have their turn as well."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another worker makes room in the same folder
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    room = max_bytes
    for _, size, path in sorted(found, reverse=True):
        room -= size
        if room < 0:
            path.unlink(missing_ok=True)
