"""Adapters from the disk or the store: whoever gives the bytes, they have the digest."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.adapters import format as adapter_format
from core.diffusion.adapter import Adapter
from core.diffusion.families import load_base
from core.storage.base import CorruptObject
from core.storage.local import LocalStore
from tests.diffusion.tiny import make_adapter, make_pipeline
from worker.adapter_cache import AdapterCache

KEY = "adapters/a"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """An adapter's bytes, and its base's fingerprint."""
    base = load_base(make_pipeline(tmp_path_factory.mktemp("cache") / "base", vae=False))
    return adapter_format.save(make_adapter(base)), base.fingerprint


@pytest.fixture
def cache(tmp_path: Path, file: tuple[bytes, str]) -> Iterator[tuple[AdapterCache, LocalStore, Path]]:
    store = LocalStore(tmp_path / "store")
    store.put(KEY, file[0])
    folder = tmp_path / "cache"
    cache = AdapterCache(folder, store)
    yield cache, store, folder
    cache.close()


def test_a_second_load_needs_no_store(cache: tuple[AdapterCache, LocalStore, Path], file: tuple[bytes, str]):
    first, store, folder = cache
    digest = hashlib.sha256(file[0]).hexdigest()
    loaded = first.load(digest, KEY, file[1])
    first.close()  # what is being written is written
    assert (folder / f"{digest}.safetensors").read_bytes() == file[0]
    store.delete(KEY)
    again = AdapterCache(folder, store)
    assert torch.equal(again.load(digest, KEY, file[1]).theta, loaded.theta)
    again.close()


def test_a_damaged_file_on_disk_is_fetched_again(cache: tuple[AdapterCache, LocalStore, Path], file: tuple[bytes, str]):
    loader, _, folder = cache
    digest = hashlib.sha256(file[0]).hexdigest()
    folder.mkdir()
    (folder / f"{digest}.safetensors").write_bytes(file[0][:-1] + b"\x01")
    assert adapter_format.save(loader.load(digest, KEY, file[1])) == file[0]
    loader.close()
    assert (folder / f"{digest}.safetensors").read_bytes() == file[0]


def test_other_bytes_in_the_store_are_refused(cache: tuple[AdapterCache, LocalStore, Path], file: tuple[bytes, str]):
    loader, _, folder = cache
    with pytest.raises(CorruptObject):
        loader.load("0" * 64, KEY, file[1])
    loader.close()
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_fails_no_load(
    cache: tuple[AdapterCache, LocalStore, Path], file: tuple[bytes, str]
):
    loader, _, folder = cache
    folder.write_text("a file, not a folder")
    digest = hashlib.sha256(file[0]).hexdigest()
    assert adapter_format.save(loader.load(digest, KEY, file[1])) == file[0]


def test_the_disk_has_its_limit_and_what_was_used_longest_ago_makes_room(
    tmp_path: Path, file: tuple[bytes, str]
) -> None:
    data, fingerprint = file
    store, folder = LocalStore(tmp_path / "store"), tmp_path / "cache"
    files = [adapter_format.save(_shifted(data, fingerprint, by)) for by in range(4)]
    digests = [hashlib.sha256(each).hexdigest() for each in files]
    folder.mkdir()
    for age, name in enumerate([f"{digests[2]}.17-ab", digests[1] + ".safetensors", digests[0] + ".safetensors"]):
        (folder / name).write_bytes(files[(2, 1, 0)[age]])
        os.utime(folder / name, (1000 + age, 1000 + age))
    for digest, each in zip(digests, files, strict=True):
        store.put(digest, each)
    cache = AdapterCache(folder, store, max_bytes=2 * len(data) + len(data) // 2)
    cache.load(digests[1], digests[1], fingerprint)  # from the disk: it is not the oldest any more
    cache.load(digests[3], digests[3], fingerprint)
    cache.close()
    assert {path.name for path in folder.iterdir()} == {f"{digests[which]}.safetensors" for which in (1, 3)}


def test_a_disk_without_room_for_any_keeps_none(tmp_path: Path, file: tuple[bytes, str]) -> None:
    store = LocalStore(tmp_path / "store")
    store.put(KEY, file[0])
    cache = AdapterCache(tmp_path / "cache", store, max_bytes=0)
    cache.load(hashlib.sha256(file[0]).hexdigest(), KEY, file[1])
    cache.close()
    assert list((tmp_path / "cache").iterdir()) == []


def _shifted(data: bytes, fingerprint: str, by: int) -> Adapter:
    adapter = adapter_format.load(data, base_fingerprint=fingerprint)
    return replace(adapter, theta=adapter.theta + by)
