"""What is past its time: rows that ended long ago, and objects that no row names."""

from datetime import timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from core.clock import utc_now
from core.db.session import Database, now
from core.evaluations import service as evaluations
from core.jobs import upkeep
from core.models import Adapter, Checkpoint, Dataset, Evaluation, IdempotencyKey, Preview, Sample
from core.samples import service as samples
from core.storage import keys
from core.storage.base import ObjectStore

GRACE = timedelta(hours=1)  # an object is stored before its row commits: younger ones are not orphans yet


def sweep(database: Database, store: ObjectStore, keep: timedelta, keep_checkpoints: int) -> int:
    """Forget rows first and delete bytes after, so that no row names an object that is gone. Returns the count."""
    with database.write() as session:
        forgotten = _forget(session, keep, keep_checkpoints)
    for key in forgotten:
        store.delete(key)
    return len(forgotten) + _remove_orphans(database, store)


def _forget(session: Session, keep: timedelta, keep_checkpoints: int) -> list[str]:
    forgotten: list[str] = []
    for checkpoint in upkeep.old_checkpoints(session, keep_checkpoints):
        forgotten.append(checkpoint.object_key)
        session.delete(checkpoint)
    for sample in samples.list_expired(session, keep):
        forgotten += [image["key"] for image in sample.images or []]
        sample.images = None
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < now(session) - keep))
    return forgotten


def _remove_orphans(database: Database, store: ObjectStore) -> int:
    """Objects that no live row names: of deleted datasets and adapters, of attempts that died before their commit.

    What is not ours to name stays, whatever else an operator keeps in the same bucket or folder.
    """
    old = [info.key for info in store.list() if info.modified_at < utc_now() - GRACE and keys.is_ours(info.key)]
    if not old:
        return 0
    with database.read() as session:
        named = _named(session)
    orphans = [key for key in old if key not in named]
    for key in orphans:
        store.delete(key)
    return len(orphans)


def _named(session: Session) -> set[str]:
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
