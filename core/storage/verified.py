"""Objects whose digest the database names. One wrong read is no verdict: a connection that breaks cuts them short."""

import hashlib
from pathlib import Path

import structlog

from core.storage.base import CorruptObject, ObjectStore

log = structlog.get_logger()

_READS = 2


def get(store: ObjectStore, key: str, sha256: str) -> bytes:
    """These bytes and no others. Raises ObjectMissing, and CorruptObject where the store keeps giving others."""
    for _ in range(_READS):
        data = store.get(key)
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        log.warning("object.read_wrong", key=key)
    raise CorruptObject("the stored bytes are not those that the database names")


def get_file(store: ObjectStore, key: str, sha256: str, path: Path) -> None:
    """As `get`, into a file."""
    for _ in range(_READS):
        store.get_file(key, path)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return
        log.warning("object.read_wrong", key=key)
    raise CorruptObject("the stored bytes are not those that the database names")
