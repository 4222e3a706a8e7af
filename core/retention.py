"""What is past its time: rows that ended long ago, and objects that no row names."""

import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import islice

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from core import faults
from core.db.session import Database, now
from core.evaluations import service as evaluations
from core.jobs import upkeep
from core.models import Adapter, Checkpoint, Dataset, Evaluation, IdempotencyKey, Preview, Sample
from core.samples import service as samples
from core.storage import keys
from core.storage.base import ObjectStore

GRACE_SECONDS = 3600.0  # an object is stored before its row commits: for so long it may be nobody's
_REMEMBERED = 100_000  # orphans at a time, some 20 MB
_SAMPLES = 100  # image requests that one transaction forgets


class Orphans:
    """Since when which object has had no row, by this process's own steady clock.

    An object's age says nothing: the clocks of the store, of whoever stored it and of this host may lie hours apart.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, remembered: int = _REMEMBERED) -> None:
        self._clock = clock
        self._remembered = remembered
        self._since: dict[str, float] = {}

    def long_since(self, orphans: Iterable[str]) -> list[str]:
        """Of all `orphans` of this look, those that were orphans in every look for the length of the grace.

        What exceeds the memory has its turn when others are gone.
        """
        moment = self._clock()
        since = {key: self._since.get(key, moment) for key in orphans}
        known_first = sorted(since, key=since.__getitem__)
        self._since = {key: since[key] for key in islice(known_first, self._remembered)}
        return [key for key, first in self._since.items() if moment - first >= GRACE_SECONDS]


def sweep(database: Database, store: ObjectStore, orphans: Orphans, keep: timedelta, keep_checkpoints: int) -> int:
    """Forget rows first and delete bytes after, so that no row names an object that is gone. Returns the count."""
    with database.write() as session:
        forgotten = _forget_checkpoints(session, keep_checkpoints)
        session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < now(session) - keep))
    removed = _remove(store, forgotten) + _remove_images(database, store, keep)
    removed += _remove(store, orphans.long_since(_orphans(database, store)))
    return removed + store.clear_leftovers()


def _forget_checkpoints(session: Session, keep: int) -> list[str]:
    forgotten = upkeep.old_checkpoints(session, keep)
    for checkpoint in forgotten:
        session.delete(checkpoint)
    return [checkpoint.object_key for checkpoint in forgotten]


def _remove_images(database: Database, store: ObjectStore, keep: timedelta) -> int:
    """However many they are: what one pass left over would pile up, pass by pass."""
    removed = 0
    while True:
        with database.write() as session:
            expired = samples.list_expired(session, keep, _SAMPLES)
            forgotten = [image["key"] for sample in expired for image in sample.images or []]
            for sample in expired:
                sample.images = None
        removed += _remove(store, forgotten)
        if len(expired) < _SAMPLES:
            return removed


def _remove(store: ObjectStore, forgotten: list[str]) -> int:
    for key in forgotten:
        faults.point("mid_object_delete")
        store.delete(key)
    return len(forgotten)


def _orphans(database: Database, store: ObjectStore) -> list[str]:
    """Objects that no live row names: of deleted datasets and adapters, of attempts that died before their commit.

    What is not ours to name stays, whatever else an operator keeps in the same bucket or folder.
    """
    ours = [info.key for info in store.list() if keys.is_ours(info.key)]
    if not ours:
        return []
    with database.read() as session:
        named = named_keys(session)
    return [key for key in ours if key not in named]


def named_keys(session: Session) -> set[str]:
    """Of every object that a live row needs."""
    live = Dataset.deleted_at.is_(None)
    in_use = samples.adapters_in_use(session) | evaluations.adapters_in_use(session)
    columns = (
        select(Dataset.object_key).where(live),
        select(Dataset.pack_key).where(live, Dataset.pack_key.is_not(None)),
        select(Dataset.report_key).where(live, Dataset.report_key.is_not(None)),
        select(Checkpoint.object_key),
        select(Preview.object_key),
        select(Adapter.object_key).where(Adapter.deleted_at.is_(None) | Adapter.id.in_(in_use)),
        select(Evaluation.partial_key).where(Evaluation.partial_key.is_not(None)),
    )
    named = {key for query in columns for key in session.scalars(query) if key} | upkeep.start_keys(session)
    for images in session.scalars(select(Sample.images).where(Sample.images.is_not(None))):
        named |= {image["key"] for image in images or []}
    return named
