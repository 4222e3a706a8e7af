"""The cpu worker's round over the datasets that wait: whose fault it is when one cannot be validated."""

import functools
import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from core.bases import Catalog
from core.datasets import service as datasets
from core.datasets.limits import Limits
from core.datasets.report import Report
from core.datasets.validation import ScratchUnavailable, ValidationInterrupted, validate
from core.db.session import Database
from core.fresh import FreshObjects
from core.models import Dataset
from core.nudges import Nudges
from core.settings import Settings
from core.storage.base import StorageUnavailable
from core.storage.local import LocalStore
from tests.datasets.archives import png, some, zip_of
from tests.rows import make_tenant
from worker.app import STOP_FILE
from worker.outages import DatabaseUnavailable
from worker.services import Services
from worker.tasks.datasets import validate_waiting

GOOD = zip_of(some())
MISBEHAVING = "tests.datasets.crashing_child"


class TruncatingStore(LocalStore):
    """Cuts the first files short, as a connection that breaks does."""

    cut = 0

    def get_file(self, key: str, path: Path) -> None:
        super().get_file(key, path)
        if self.cut:
            self.cut -= 1
            os.truncate(path, path.stat().st_size // 2)


@pytest.fixture
def services(settings: Settings, sqlite_template: Path) -> Iterator[Services]:
    settings.data_dir.mkdir()
    shutil.copyfile(sqlite_template, settings.data_dir / "difffit.db")
    store = TruncatingStore(settings.data_dir / "objects")
    services = Services(
        settings=settings,
        database=Database(settings.database),
        store=store,
        nudges=Nudges(settings.broker),
        fresh=FreshObjects(settings.broker, store),
        catalog=Catalog([]),
        worker="this process",
    )
    yield services
    services.nudges.close()
    services.fresh.close()
    services.database.close()


@pytest.fixture
def misbehaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real child, but for a decoder that misbehaves on the pictures named after a misdeed."""
    monkeypatch.setattr("worker.tasks.datasets.validate", functools.partial(validate, module=MISBEHAVING))


@pytest.fixture
def stop_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    return tmp_path / "stop"


def upload(services: Services, archive: bytes = GOOD) -> str:
    """An archive of a tenant of its own; the id."""
    with services.database.write() as session:
        tenant_id = make_tenant(session).id
        dataset_id, key = datasets.new_dataset_id(tenant_id)
        services.store.put(key, archive)
        sha256 = hashlib.sha256(archive).hexdigest()
        size = len(archive)
        datasets.create_dataset(
            session, tenant_id, dataset_id, filename="a.zip", purpose="fine-tune", size=size, sha256=sha256
        )
    return dataset_id


def found(services: Services, dataset_id: str) -> Dataset:
    with services.database.read() as session:
        return session.get_one(Dataset, dataset_id)


def scratch(services: Services) -> Path:
    return services.settings.data_dir / "scratch"


def test_all_that_wait_are_validated_and_no_scratch_is_left(services: Services) -> None:
    ids = [upload(services), upload(services, zip_of({"a.png": b""})), upload(services)]
    validate_waiting(services)
    assert [found(services, dataset_id).status for dataset_id in ids] == ["processed", "error", "processed"]
    assert list(scratch(services).iterdir()) == []


def test_one_that_kills_its_process_each_time_ends_and_holds_up_nobody(services: Services, misbehaving: None) -> None:
    poison = upload(services, zip_of({**some(), "cats/killed.png": png(50)}))
    neighbour = upload(services)
    with pytest.raises(ValidationInterrupted):
        validate_waiting(services)
    assert found(services, poison).crashes == 1
    with pytest.raises(ValidationInterrupted):
        validate_waiting(services)
    assert found(services, neighbour).status == "processed", "its turn comes before a second try of the other"
    with pytest.raises(ValidationInterrupted):
        validate_waiting(services)
    row = found(services, poison)
    assert (row.status, row.error_code, row.attempt) == ("error", "crashed", 3)
    validate_waiting(services)


@pytest.mark.parametrize("room_beside_archive", [None, 4096], ids=["no room for the archive", "no room for the pack"])
def test_a_full_disk_is_counted_against_no_dataset(services: Services, room_beside_archive: int | None) -> None:
    archive = zip_of(some(count=100))
    dataset_id = upload(services, archive)
    disk = scratch(services)
    disk.mkdir()
    size = 4096 if room_beside_archive is None else len(archive) + room_beside_archive
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount")
    wanted = StorageUnavailable if room_beside_archive is None else ScratchUnavailable
    try:
        for _ in range(4):
            with pytest.raises(wanted):
                validate_waiting(services)
        row = found(services, dataset_id)
        assert (row.status, row.crashes, row.attempt, row.lease_until) == ("uploaded", 0, 4, None)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    validate_waiting(services)
    assert found(services, dataset_id).status == "processed"


def test_a_scratch_folder_that_cannot_be_made_is_counted_against_no_dataset(services: Services) -> None:
    dataset_id = upload(services)
    scratch(services).write_bytes(b"a file where a folder is needed")
    with pytest.raises(ScratchUnavailable):
        validate_waiting(services)
    row = found(services, dataset_id)
    assert (row.status, row.crashes, row.lease_until) == ("uploaded", 0, None)


def test_a_worker_that_shuts_down_gives_the_dataset_back_at_once(
    services: Services, misbehaving: None, stop_file: Path
) -> None:
    dataset_id = upload(services, zip_of({**some(), "cats/sleep.png": png(50)}))
    waiting = upload(services)

    def stop_when_it_reads() -> None:
        while not list(scratch(services).glob("*/*.part")):
            time.sleep(0.01)
        stop_file.touch()

    stopper = threading.Thread(target=stop_when_it_reads, daemon=True)
    stopper.start()
    validate_waiting(services)  # the child would sleep for ten minutes
    stopper.join()
    row = found(services, dataset_id)
    assert (row.status, row.crashes, row.attempt, row.lease_until) == ("uploaded", 0, 1, None)
    assert found(services, waiting).attempt == 0, "a worker that shuts down claims nothing more"
    assert list(scratch(services).iterdir()) == []


def test_a_process_that_ends_with_its_worker_is_not_counted(
    services: Services, stop_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stops a whole group of processes ends the child as well, perhaps before the next tick."""
    dataset_id = upload(services, zip_of({**some(), "cats/killed.png": png(50)}))

    def stopped(archive: Path, out: Path, limits: Limits, **_: object) -> Report:
        stop_file.touch()
        return validate(archive, out, limits, module=MISBEHAVING)

    monkeypatch.setattr("worker.tasks.datasets.validate", stopped)
    with pytest.raises(ValidationInterrupted):
        validate_waiting(services)
    assert found(services, dataset_id).crashes == 0


def away_at_the_verdict(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The database does not answer then, so often."""
    real = datasets.finish_validation
    errors = [OperationalError("UPDATE", {}, Exception("the connection is lost")) for _ in range(times)]

    def finish(*given: Any) -> bool:
        if errors:
            raise errors.pop()
        return real(*given)

    monkeypatch.setattr(datasets, "finish_validation", finish)


def test_a_database_that_is_away_at_the_verdict_is_waited_for(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset_id = upload(services)
    away_at_the_verdict(monkeypatch, times=1)
    validate_waiting(services)
    row = found(services, dataset_id)
    assert (row.status, row.attempt, row.crashes) == ("processed", 1, 0)


def test_a_database_that_stays_away_is_counted_against_no_dataset(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.settings.lease_seconds = 0.1
    dataset_id = upload(services)
    away_at_the_verdict(monkeypatch, times=100)
    with pytest.raises(DatabaseUnavailable):
        validate_waiting(services)
    row = found(services, dataset_id)
    assert (row.status, row.crashes, row.lease_until) == ("uploaded", 0, None)


def test_other_bytes_than_were_uploaded_are_never_used(services: Services) -> None:
    dataset_id = upload(services)
    services.store.put(found(services, dataset_id).object_key, zip_of(some("dogs")))
    validate_waiting(services)
    row = found(services, dataset_id)
    assert (row.status, row.error_code, row.pack_key) == ("error", "dataset_corrupt", None)
    assert "upload it again" in str(row.status_details)


def test_an_archive_that_arrives_cut_short_is_fetched_again(services: Services) -> None:
    assert isinstance(services.store, TruncatingStore)
    services.store.cut = 1
    dataset_id = upload(services)
    validate_waiting(services)
    assert found(services, dataset_id).status == "processed"


def test_what_killed_workers_left_in_the_scratch_folder_is_removed(services: Services) -> None:
    dataset_id = upload(services)
    for name in (f"{dataset_id}-0", "file-another-7", "file-running-1"):
        (scratch(services) / name).mkdir(parents=True)
        (scratch(services) / name / "archive").write_bytes(b"x")
    for path in (scratch(services) / "file-another-7", scratch(services) / "file-another-7" / "archive"):
        os.utime(path, (0, 0))
    validate_waiting(services)
    assert [path.name for path in scratch(services).iterdir()] == ["file-running-1"]
