"""Adapters from the disk or the store: whoever gives the bytes, they have the digest."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.adapters import format as adapter_format
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
