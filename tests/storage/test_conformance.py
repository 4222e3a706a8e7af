"""What every object store must do, on the folder and on a real S3 server."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from core.clock import utc_now
from core.settings import Settings
from core.storage import keys, open_store
from core.storage.base import ObjectMissing, ObjectStore, StorageUnavailable
from core.storage.local import LocalStore
from core.storage.s3 import S3Store
from tests.conftest import make_settings
from tests.races import race
from tests.servers import SeaweedFS

OURS = keys.archive(f"tenant-{'a' * 25}", "file-1")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.stack)])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    settings: Settings = request.getfixturevalue("settings" if request.param == "local" else "s3_settings")
    opened = open_store(settings)
    assert isinstance(opened, LocalStore if request.param == "local" else S3Store)
    return opened


def keys_of(store: ObjectStore, prefix: str = "") -> list[str]:
    return sorted(info.key for info in store.list(prefix))


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
def test_what_is_put_is_got_back(store: ObjectStore, data: bytes) -> None:
    store.put("tenant-1/datasets/file-1/archive", data)
    assert store.get("tenant-1/datasets/file-1/archive") == data
    assert b"".join(store.stream("tenant-1/datasets/file-1/archive", 1000)) == data
    assert [info.size for info in store.list()] == [len(data)]


@pytest.mark.parametrize("size", [0, 1, 20 * 1024**2 + 7])  # the last one goes to S3 in parts
def test_files_go_in_and_come_out_whole(store: ObjectStore, tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(size))
    store.put_file("a/b", source)
    store.get_file("a/b", target)
    assert target.read_bytes() == source.read_bytes() == b"".join(store.stream("a/b"))
    assert source.exists()


def test_an_object_that_is_not_there_is_missing_and_leaves_no_file(store: ObjectStore, tmp_path: Path) -> None:
    store.put("folder/object", b"x")
    target = tmp_path / "target"
    reads: list[Callable[[str], Any]] = [store.get, store.stream, lambda key: store.get_file(key, target)]
    for key in ("nothing", "folder/other", "folder", "folder/object/deeper"):
        for read in reads:
            with pytest.raises(ObjectMissing):
                read(key)
    assert not target.exists()


def test_a_file_that_cannot_be_written_is_no_fault_of_the_object(store: ObjectStore, tmp_path: Path) -> None:
    store.put("key", b"x")
    with pytest.raises(StorageUnavailable):
        store.get_file("key", tmp_path / "no-such-folder" / "target")


def test_a_second_put_replaces_the_first(store: ObjectStore) -> None:
    store.put("key", b"first, and longer")
    store.put("key", b"second")
    store.put("key", b"second")
    assert store.get("key") == b"second"
    assert keys_of(store) == ["key"]


def test_deleting_twice_is_no_error(store: ObjectStore) -> None:
    store.put("key", b"x")
    store.put("key-2", b"x")
    for _ in range(2):
        store.delete("key")
        assert keys_of(store) == ["key-2"]
    store.put("folder/object", b"x")
    for absent in ("never/was", "folder", "folder/object/deeper"):
        store.delete(absent)
    assert keys_of(store) == ["folder/object", "key-2"]


def test_a_list_holds_what_begins_with_the_prefix(store: ObjectStore) -> None:
    for key in ("tenant-1/a", "tenant-1/b/c", "tenant-10/a", "tenant-2/a"):
        store.put(key, b"12345")
    assert keys_of(store, "tenant-1/") == ["tenant-1/a", "tenant-1/b/c"]
    assert keys_of(store, "tenant-1") == ["tenant-1/a", "tenant-1/b/c", "tenant-10/a"]
    assert keys_of(store, "nobody/") == []
    (info,) = store.list("tenant-2/")
    assert (info.size, info.modified_at.utcoffset() is not None) == (5, True)


def test_a_list_goes_beyond_one_page_of_s3(store: ObjectStore) -> None:
    many = [f"many/{number:04d}" for number in range(1003 if isinstance(store, LocalStore) else 1001)]
    for key in many:
        store.put(key, b"")
    assert keys_of(store, "many/") == many


def test_readers_see_one_version_or_the_other_while_it_is_replaced(store: ObjectStore) -> None:
    versions = [bytes([number]) * 200_000 for number in range(2)]
    store.put("key", versions[0])

    def write() -> None:
        for number in range(10):
            store.put("key", versions[number % 2])

    def read() -> set[bytes]:
        return {store.get("key") for _ in range(15)}

    seen = race(write, read, read)
    assert (seen[1] | seen[2]) <= set(versions)


def test_what_is_stored_is_no_leftover(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(20 * 1024**2))
    store.put_file(OURS, tmp_path / "large")
    assert store.clear_leftovers() == 0
    assert keys_of(store) == [OURS]


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.stack)])
def test_a_file_whose_upload_dies_is_not_there(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    settings: Settings = request.getfixturevalue("settings" if kind == "local" else "s3_settings")
    store = open_store(settings)
    (tmp_path / "large").write_bytes(bytes(20 * 1024**2))  # S3 has it in parts
    code = (
        "import sys; from pathlib import Path; from core import storage; from core.settings import get_settings;"
        "storage.open_store(get_settings()).put_file(sys.argv[1], Path(sys.argv[2]))"
    )
    told = {f"DIFFFIT_{name.upper()}": value for name, value in _raw(settings).items()}
    environment = {**os.environ, **told, "DIFFFIT_DATA_DIR": str(settings.data_dir), "FAULT": "upload_part:3:kill"}
    command = [sys.executable, "-c", code, OURS, str(tmp_path / "large")]
    assert subprocess.run(command, env=environment, check=False, timeout=60).returncode == -signal.SIGKILL
    assert keys_of(store) == []
    store.put_file(OURS, tmp_path / "large")
    assert [info.size for info in store.list()] == [20 * 1024**2]


def test_a_store_that_is_there_answers(store: ObjectStore) -> None:
    store.ping()


# --- the folder


def test_a_put_that_fails_leaves_nothing(tmp_path: Path, settings: Settings) -> None:
    store = open_store(settings)
    with pytest.raises(StorageUnavailable):
        store.put_file("key", tmp_path / "not-there")
    folder = Path(settings.objects)
    (folder / "blocked").write_bytes(b"a file where a folder is needed")
    with pytest.raises(StorageUnavailable):
        store.put("blocked/key", b"x")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["blocked"]


def test_a_full_disk_is_unavailable(settings: Settings) -> None:
    store = open_store(settings)
    store.put("key", b"x")
    with pytest.raises(StorageUnavailable, match="No space"):
        store.get_file("key", Path("/dev/full"))


def test_half_an_object_is_no_object(settings: Settings) -> None:
    """What a killed process leaves behind is not listed and not read."""
    store = open_store(settings)
    store.ping()
    (Path(settings.objects) / ".staging" / "half").write_bytes(b"ha")
    assert keys_of(store) == []


def test_half_an_object_goes_when_its_writer_is_long_gone(settings: Settings) -> None:
    store = open_store(settings)
    store.put("key", b"x")
    staging = Path(settings.objects) / ".staging"
    for name in ("half", "being-written"):
        (staging / name).write_bytes(b"ha")
    os.utime(staging / "half", (0, 0))
    assert store.clear_leftovers() == 1
    assert [path.name for path in staging.iterdir()] == ["being-written"]
    assert store.get("key") == b"x"


def test_no_empty_folder_is_left(settings: Settings) -> None:
    store = open_store(settings)
    for key in ("tenant/samples/one/0", "tenant/samples/two/0", "tenant/samples/two/1"):
        store.put(key, b"x")
    for key in ("tenant/samples/one/0", "tenant/samples/two/1", "tenant/samples/three/0"):
        store.delete(key)
    root = Path(settings.objects)
    assert sorted(path.name for path in (root / "tenant" / "samples").iterdir()) == ["two"]
    store.delete("tenant/samples/two/0")
    assert [path.name for path in root.iterdir()] == [".staging"]


def test_a_put_wins_against_the_removal_of_its_folder(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has just deleted what else was in it."""
    store = open_store(settings)
    made, removals = Path.mkdir, ["one", "one", "tenant"]

    def and_removed(self: Path, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        if removals and self.name == removals[-1]:
            removals.pop()
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", and_removed)
    store.put("tenant/samples/one/0", b"x")
    assert (store.get("tenant/samples/one/0"), removals) == (b"x", [])


def test_a_folder_that_goes_while_it_is_listed_holds_nothing(settings: Settings) -> None:
    store = open_store(settings)
    for key in ("a/0", "b/0", "c/0"):
        store.put(key, b"x")
    listed = store.list()
    assert next(listed).key == "a/0"
    store.delete("b/0")
    assert [info.key for info in listed] == ["c/0"]


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/hostname"])
def test_no_key_leaves_the_folder(settings: Settings, key: str) -> None:
    store = open_store(settings)
    for use in (store.get, store.delete, lambda name: store.put(name, b"x")):
        with pytest.raises(ValueError, match="left the store"):
            use(key)


def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageUnavailable):
        LocalStore(tmp_path / "file" / "objects").ping()


# --- S3


@pytest.mark.stack
def test_two_prefixes_of_one_bucket_do_not_see_each_other(s3_settings: Settings) -> None:
    other = s3_settings.model_copy(update={"object_store": f"{s3_settings.object_store}-other"})
    here, there = open_store(s3_settings), open_store(other)
    here.put("key", b"here")
    assert keys_of(there) == []
    with pytest.raises(ObjectMissing):
        there.get("key")


@pytest.mark.stack
def test_a_wrong_key_and_a_missing_bucket_are_said(s3_settings: Settings) -> None:
    wrong = make_settings(s3_settings.data_dir, **_raw(s3_settings) | {"s3_secret_access_key": "wrong"})
    with pytest.raises(StorageUnavailable, match=r"SignatureDoesNotMatch|403"):
        open_store(wrong).put("key", b"x")
    absent = make_settings(s3_settings.data_dir, **_raw(s3_settings) | {"object_store": "s3://no-such-bucket"})
    with pytest.raises((StorageUnavailable, ObjectMissing)):
        open_store(absent).ping()


@pytest.mark.stack
def test_uploads_that_were_never_completed_are_aborted_after_a_day(
    s3_settings: Settings, seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, client = open_store(s3_settings), seaweedfs.client()
    prefix = s3_settings.objects.split("/", 3)[3]
    theirs = "photos/family.jpg"
    for key in (OURS, theirs):
        begun = client.create_multipart_upload(Bucket=seaweedfs.bucket, Key=f"{prefix}/{key}")
        client.upload_part(
            Bucket=seaweedfs.bucket, Key=begun["Key"], UploadId=begun["UploadId"], PartNumber=1, Body=b"half"
        )

    def pending() -> list[str]:
        page = client.list_multipart_uploads(Bucket=seaweedfs.bucket, Prefix=prefix)
        return sorted(upload["Key"].removeprefix(f"{prefix}/") for upload in page.get("Uploads", []))

    assert (store.clear_leftovers(), pending()) == (0, [theirs, OURS])
    monkeypatch.setattr("core.storage.s3.utc_now", lambda: utc_now() + timedelta(hours=25))
    assert (store.clear_leftovers(), pending()) == (1, [theirs])


@pytest.mark.stack
def test_a_store_that_does_not_list_uploads_has_no_leftovers(s3_settings: Settings) -> None:
    refused = make_settings(s3_settings.data_dir, **_raw(s3_settings) | {"s3_secret_access_key": "wrong"})
    assert open_store(refused).clear_leftovers() == 0


def test_a_server_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    settings = make_settings(
        tmp_path,
        object_store="s3://bucket/prefix",
        s3_endpoint_url="http://127.0.0.1:9",  # discard: nobody listens there
        s3_access_key_id="a",
        s3_secret_access_key="b",
    )
    store = open_store(settings)
    (tmp_path / "file").write_bytes(b"x")
    uses: list[Callable[[], Any]] = [store.ping, store.clear_leftovers, lambda: next(store.list())]
    for use in (*uses, lambda: store.put_file("key", tmp_path / "file")):
        with pytest.raises(StorageUnavailable):
            use()


def _raw(settings: Settings) -> dict[str, Any]:
    """What says where an S3 store is, with its secret in the open; nothing of a folder."""
    if settings.s3_secret_access_key is None:
        return {}
    return {
        "object_store": settings.object_store,
        "s3_endpoint_url": settings.s3_endpoint_url,
        "s3_access_key_id": settings.s3_access_key_id,
        "s3_secret_access_key": settings.s3_secret_access_key.get_secret_value(),
    }
