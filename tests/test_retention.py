"""What is removed for good: never what a row names or may yet name, and in the end all else."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update

from core import retention
from core.bases import Catalog
from core.db.session import Database, now
from core.jobs import attempts
from core.models import Adapter, Dataset, Sample
from core.retention import GRACE_SECONDS, Orphans
from core.storage import keys
from core.storage.local import LocalStore
from tests.rows import adapter_for, claim_job, make_dataset, make_job, make_sample, make_tenant

KEEP = timedelta(hours=1)


@dataclass
class Clock:
    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Upkeep:
    """Retention on one store, with a clock that a test moves."""

    database: Database
    store: LocalStore
    clock: Clock
    orphans: Orphans

    def kept(self, after: float = 0.0) -> set[str]:
        """The objects that are left by a pass so many seconds later."""
        self.clock.seconds += after
        retention.sweep(self.database, self.store, self.orphans, KEEP, keep_checkpoints=3)
        return {info.key for info in self.store.list()}


@pytest.fixture
def upkeep(database: Database, tmp_path: Path) -> Upkeep:
    clock = Clock()
    return Upkeep(database, LocalStore(tmp_path / "objects"), clock, Orphans(clock))


@pytest.mark.parametrize("hours", [-2, 2])
def test_bytes_that_wait_for_their_row_are_safe_whatever_the_stores_clock_says(
    upkeep: Upkeep, catalog: Catalog, tmp_path: Path, hours: int
) -> None:
    with upkeep.database.write() as session:
        make_job(session, make_tenant(session), catalog)
        plan = claim_job(session, catalog)
    adapter = adapter_for(plan)
    adapter.object_key = keys.adapter(plan.tenant_id, "ft-1", adapter.sha256)
    upkeep.store.put(adapter.object_key, b"bytes")
    moment = os.stat(tmp_path / "objects" / adapter.object_key).st_mtime + 3600 * hours
    os.utime(tmp_path / "objects" / adapter.object_key, (moment, moment))
    assert upkeep.kept() == {adapter.object_key}
    assert upkeep.kept(after=GRACE_SECONDS - 1) == {adapter.object_key}
    with upkeep.database.write() as session:
        assert attempts.finish(session, plan, adapter, {})
    assert upkeep.kept(after=GRACE_SECONDS) == {adapter.object_key}
    with upkeep.database.write() as session:
        session.execute(update(Adapter).values(deleted_at=now(session)))
    assert upkeep.kept() == {adapter.object_key}, "its grace begins when it loses its row"
    assert upkeep.kept(after=GRACE_SECONDS) == set()


def test_what_an_operator_keeps_beside_it_stays(upkeep: Upkeep) -> None:
    upkeep.store.put("photos/family.jpg", b"x")
    assert upkeep.kept() == upkeep.kept(after=10 * GRACE_SECONDS) == {"photos/family.jpg"}


def test_a_deleted_file_goes_and_its_neighbour_stays(upkeep: Upkeep) -> None:
    with upkeep.database.write() as session:
        tenant = make_tenant(session)
        made = []
        for _ in range(2):
            made.append(make_dataset(session, tenant, "uploaded"))
        for dataset in made:
            upkeep.store.put(dataset.object_key, b"x")
        session.execute(update(Dataset).where(Dataset.id == made[0].id).values(deleted_at=now(session)))
    assert len(upkeep.kept()) == 2
    assert upkeep.kept(after=GRACE_SECONDS) == {made[1].object_key}


def test_more_orphans_than_are_remembered_go_in_several_turns() -> None:
    clock = Clock()
    orphans, waiting = Orphans(clock, remembered=2), {"a", "b", "c"}
    gone: list[str] = []
    for _ in range(4):
        removed = orphans.long_since(sorted(waiting))
        assert len(removed) <= 2
        gone += removed
        waiting -= set(removed)
        clock.seconds += GRACE_SECONDS
    assert (sorted(gone), waiting) == (["a", "b", "c"], set())


def test_all_images_past_their_time_go_in_one_pass_however_many_they_are(upkeep: Upkeep, catalog: Catalog) -> None:
    with upkeep.database.write() as session:
        tenant = make_tenant(session)
        made = [make_sample(session, tenant, catalog, max_queued=1000) for _ in range(251)]
        for sample in made:
            key = keys.image(tenant.id, sample.id, 1, 0)
            upkeep.store.put(key, b"x")
            sample.status, sample.images = "succeeded", [{"key": key}]
            sample.finished_at = now(session) - KEEP - timedelta(seconds=1)
        young = made[-1]
        young.finished_at = now(session)
    assert upkeep.kept() == {keys.image(young.tenant_id, young.id, 1, 0)}
    with upkeep.database.read() as session:
        assert session.scalars(select(Sample.id).where(Sample.images.is_not(None))).all() == [young.id]
