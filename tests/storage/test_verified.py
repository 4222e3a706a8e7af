"""Bytes by their digest: one wrong read is nothing, wrong bytes are never used."""

import hashlib
from pathlib import Path

import pytest

from core.storage import verified
from core.storage.base import CorruptObject, ObjectMissing
from core.storage.local import LocalStore
from tests.storage.lying import lie_once

DATA = b"what was put"
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "objects")
    store.put("a", DATA)
    return store


def test_an_object_that_is_read_wrong_once_is_read_again(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    lied = lie_once(monkeypatch, "a")
    assert verified.get(store, "a", SHA256) == DATA
    assert lied == ["a"]


def test_a_file_that_is_read_wrong_once_is_read_again(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = LocalStore.get_file, 0

    def cut_short(store: LocalStore, key: str, path: Path) -> None:
        nonlocal reads
        reads += 1
        real(store, key, path)
        if reads == 1:
            path.write_bytes(DATA[:5])

    monkeypatch.setattr(LocalStore, "get_file", cut_short)
    verified.get_file(store, "a", SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert reads == 2


def test_other_bytes_than_the_database_names_are_never_used(store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(CorruptObject):
        verified.get(store, "a", "0" * 64)
    with pytest.raises(CorruptObject):
        verified.get_file(store, "a", "0" * 64, tmp_path / "file")
    with pytest.raises(ObjectMissing):
        verified.get(store, "b", SHA256)
