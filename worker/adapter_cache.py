"""Adapter files on the local disk, by digest: between the object store and the memory of a worker."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from core.adapters import format as adapter_format
from core.diffusion.adapter import Adapter
from core.storage.base import CorruptObject, ObjectStore

log = structlog.get_logger()


class AdapterCache:
    """Whoever an adapter's bytes come from, they have its digest. Any thread may load."""

    def __init__(self, folder: Path, store: ObjectStore) -> None:
        self._folder = folder
        self._store = store
        # A file is written behind the load that fetched it: nobody waits for the disk.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="adapter-cache")

    def load(self, digest: str, key: str, fingerprint: str) -> Adapter:
        """From the disk, else from the store under `key`. Raises CorruptObject, and what a store and a file raise."""
        path = self._folder / f"{digest}.safetensors"
        data = path.read_bytes() if path.exists() else None
        if data is not None and hashlib.sha256(data).hexdigest() == digest:
            return adapter_format.load(data, base_fingerprint=fingerprint)
        data = self._store.get(key)
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptObject("the adapter's bytes differ from what was published", code="adapter_corrupt")
        adapter = adapter_format.load(data, base_fingerprint=fingerprint)
        self._writer.submit(_write, path, data)
        return adapter

    def close(self) -> None:
        self._writer.shutdown()


def _write(path: Path, data: bytes) -> None:
    """A full disk must not fail a request: the cache is only a cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(f".{os.getpid()}-{id(data):x}")  # of this process and this write alone
        staged.write_bytes(data)
        staged.replace(path)
    except OSError as error:
        log.warning("cache.failed", error=error.strerror)
