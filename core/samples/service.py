"""Requests for images: queued in the database, drawn by whichever worker claims them first."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import Update

from core import outbox
from core.bases import Catalog
from core.db.leases import list_lost
from core.db.session import clock, now, wrote
from core.diffusion.catalog import BaseSummary
from core.errors import Conflict, OverQuota, Unavailable
from core.models import Adapter, Sample
from core.samples.spec import SampleSpec
from core.tenants.admission import admit
from core.unread import Unread

UNFINISHED = ("queued", "running")
_UNREAD = Unread("sample")


@dataclass(frozen=True)
class PlannedAdapter:
    """`digest` pins the bytes, which lie under `key`."""

    digest: str
    key: str
    weight: float
    label: int | None


@dataclass(frozen=True)
class Claimed:
    """One claim of one request: the fence that every write carries, whether or not the request can be read."""

    sample_id: str
    attempt: int


@dataclass(frozen=True)
class SamplePlan(Claimed):
    """And what a worker needs."""

    tenant_id: str
    crashes: int  # of workers
    base: str
    spec: SampleSpec
    adapters: tuple[PlannedAdapter, ...]
    seconds_left: float | None  # until its deadline


class QueueFull(Unavailable):
    """More requests wait, of all tenants together, than the service takes."""

    code = "queue_full"


def create_sample(
    session: Session,
    tenant_id: str,
    base: BaseSummary,
    spec: SampleSpec,
    max_queued: int,
    max_waiting: int | None = None,
) -> Sample:
    """Queue a request; `max_queued` bounds the tenant's, `max_waiting` everybody's.

    Raises OverQuota, QueueFull, Suspended.
    """
    admit(session, tenant_id)
    queued, mine = session.execute(
        select(
            func.count().filter(Sample.status == "queued"), func.count().filter(Sample.tenant_id == tenant_id)
        ).where(Sample.status.in_(UNFINISHED))
    ).one()
    if max_waiting is not None and queued >= max_waiting:
        raise QueueFull(f"{queued} requests wait already: ask again")
    if mine >= max_queued:
        raise OverQuota(f"{mine} image requests are unfinished: wait for some", retry_after_seconds=5)
    alone = spec.adapters[0] if len(spec.adapters) == 1 else None
    sample = Sample(
        tenant_id=tenant_id,
        model=alone.model if alone else base.name,
        base=base.name,
        adapter_id=alone.adapter_id if alone else None,
        request=spec.to_json(),
    )
    if spec.timeout is not None:
        sample.deadline = now(session) + timedelta(seconds=spec.timeout)
    session.add(sample)
    session.flush()
    outbox.put(session, "sample.draw", sample_id=sample.id)
    return sample


def claim(
    session: Session, worker: str, lease_seconds: float, catalog: Catalog, limit: int, suspects: bool = False
) -> list[SamplePlan]:
    """Up to `limit` waiting requests: every tenant's oldest first, then every tenant's second, and so on.

    None that is past its deadline: `expire` gives those up. What another release wrote and this one cannot read stays
    in the queue. Either of those that no worker has died with, or of the others, which are `suspects`.
    """
    turn = func.row_number().over(partition_by=Sample.tenant_id, order_by=(Sample.created_at, Sample.id)).label("turn")
    in_time = Sample.deadline.is_(None) | (Sample.deadline >= clock(session))
    known = Sample.crashes > 0 if suspects else Sample.crashes == 0
    ranked = select(Sample.id, turn).where(*_waiting(catalog), known, in_time).subquery()
    fair = select(Sample.id).join(ranked, ranked.c.id == Sample.id).where(Sample.status == "queued")
    fair = fair.order_by(ranked.c.turn, Sample.created_at, Sample.id).limit(limit)
    chosen = fair.with_for_update(skip_locked=True, of=Sample).cte("chosen")
    taken = (
        update(Sample)
        .where(Sample.id.in_(select(chosen.c.id)), Sample.status == "queued")
        .values(
            status="running",
            attempt=Sample.attempt + 1,
            worker=worker,
            lease_until=clock(session) + timedelta(seconds=lease_seconds),
        )
        .returning(Sample)
    )
    return _plans(session, _readable(_in_turn(session.scalars(taken))))


def _in_turn(rows: Iterable[Sample]) -> list[Sample]:
    """As they were ranked, for RETURNING keeps no order."""
    turns: Counter[str] = Counter()
    ranked: list[tuple[int, Sample]] = []
    for row in sorted(rows, key=lambda row: (row.created_at, row.id)):
        turns[row.tenant_id] += 1
        ranked.append((turns[row.tenant_id], row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def expire(session: Session) -> list[str]:
    """Give up what waits still and has no time left; the ids."""
    late = update(Sample).where(Sample.status == "queued", Sample.deadline < clock(session))
    error = {"code": "deadline_exceeded", "message": "its turn did not come within its timeout", "param": "timeout"}
    ended = late.values(status="failed", error=error, finished_at=clock(session)).returning(Sample.id)
    return list(session.scalars(ended))


def cancel(session: Session, sample: Sample) -> Sample:
    """At once where no worker holds it, else before its next step. Raises Conflict for one that has ended."""
    session.refresh(sample, with_for_update={"key_share": True})  # or a worker might hand it back in between
    own = update(Sample).where(Sample.id == sample.id)
    ended = {"status": "cancelled", "finished_at": clock(session)}
    if not wrote(session, own.where(Sample.status == "queued").values(**ended)) and not wrote(
        session, own.where(Sample.status == "running").values(cancel_requested=True)
    ):
        session.refresh(sample)
        raise Conflict(f"image generation {sample.id} is {sample.status} already", code="generation_ended")
    session.refresh(sample)
    return sample


def list_cancelled(session: Session, sample_ids: Sequence[str]) -> list[str]:
    """Which of these a worker should stop."""
    return list(session.scalars(select(Sample.id).where(Sample.id.in_(sample_ids), Sample.cancel_requested)))


def is_waiting(session: Session, catalog: Catalog) -> bool:
    """Cheap enough to ask between steps."""
    return session.scalar(select(Sample.id).where(*_waiting(catalog)).limit(1)) is not None


def extend(session: Session, plans: list[SamplePlan], lease_seconds: float) -> None:
    until = clock(session) + timedelta(seconds=lease_seconds)
    for plan in plans:
        session.execute(_held(plan).values(lease_until=until))


def add_partial(session: Session, plan: SamplePlan, partial: dict[str, Any]) -> bool:
    """A picture on its way, for who watches. False: another attempt has taken over."""
    held = (Sample.id == plan.sample_id, Sample.status == "running", Sample.attempt == plan.attempt)
    row = session.scalar(select(Sample).where(*held).with_for_update())
    if row is None:
        return False
    row.partials = [*row.partials, partial]
    return True


def stop(session: Session, plan: Claimed) -> bool:
    """Carry out a cancel."""
    values = {"status": "cancelled", "finished_at": clock(session), "lease_until": None}
    return wrote(session, _held(plan).values(**values))


def finish(session: Session, plan: SamplePlan, images: list[dict[str, Any]], stats: dict[str, Any]) -> bool:
    """False: another attempt has taken over."""
    values = {
        "status": "succeeded",
        "images": images,
        "stats": stats,
        "finished_at": clock(session),
        "lease_until": None,
    }
    return wrote(session, _held(plan).values(**values))


def fail(session: Session, plan: Claimed, *, code: str, message: str, param: str | None = None) -> bool:
    error = {"code": code, "message": message, "param": param}
    values = {"status": "failed", "error": error, "finished_at": clock(session), "lease_until": None}
    return wrote(session, _held(plan).values(**values))


def release(session: Session, plan: Claimed) -> bool:
    """Back to the queue: the worker shuts down or its store does not answer."""
    if not wrote(session, _held(plan).values(status="queued", lease_until=None, partials=[])):
        return False
    outbox.put(session, "sample.draw", sample_id=plan.sample_id)
    return True


def sweep(session: Session, max_attempts: int) -> bool:
    """Take back requests whose lease ran out. True when any request waits for a worker."""
    expire(session)
    for sample in list_lost(session, Sample, "running"):
        sample.crashes += 1
        session.flush()
        plan = Claimed(sample.id, sample.attempt)
        if sample.cancel_requested:
            stop(session, plan)
        elif sample.crashes >= max_attempts:
            fail(session, plan, code="crashed", message=f"given up after {sample.crashes} crashes")
        else:
            release(session, plan)
    return session.scalar(select(Sample.id).where(Sample.status == "queued").limit(1)) is not None


def adapters_in_use(session: Session) -> set[str]:
    """Ids of adapters that unfinished requests are drawn with, deleted ones too."""
    requests = session.scalars(select(Sample.request).where(Sample.status.in_(UNFINISHED)))
    return {part["adapter_id"] for request in requests for part in request["adapters"]}


def list_ended(session: Session, sample_ids: list[str]) -> list[str]:
    """Which of these requests nobody needs to wait for any more."""
    ended = (Sample.id.in_(sample_ids), Sample.status.not_in(UNFINISHED))
    return list(session.scalars(select(Sample.id).where(*ended)))


def list_expired(session: Session, keep: timedelta, limit: int = 100) -> list[Sample]:
    """Requests whose images have been kept long enough."""
    ended = (Sample.finished_at < clock(session) - keep, Sample.images.is_not(None))
    return list(session.scalars(select(Sample).where(*ended).limit(limit)))


def _waiting(catalog: Catalog) -> tuple[ColumnElement[bool], ...]:
    return Sample.status == "queued", Sample.base.in_(catalog.names()), Sample.id.not_in(_UNREAD.ids())


def _readable(rows: Sequence[Sample]) -> list[tuple[Sample, SampleSpec]]:
    """Of those just taken; the others are as if nobody had taken them."""
    readable: list[tuple[Sample, SampleSpec]] = []
    for row in rows:
        spec = _UNREAD.read(row.id, lambda row=row: SampleSpec.from_json(row.request))
        if spec is not None:
            readable.append((row, spec))
        else:
            row.status, row.attempt, row.worker, row.lease_until = "queued", row.attempt - 1, None, None
    return readable


def _plans(session: Session, specs: Sequence[tuple[Sample, SampleSpec]]) -> list[SamplePlan]:
    named = {part.adapter_id for _, spec in specs for part in spec.adapters}
    adapters = {row.id: row for row in session.scalars(select(Adapter).where(Adapter.id.in_(named)))} if named else {}
    moment = now(session) if any(row.deadline for row, _ in specs) else None
    return [
        SamplePlan(
            sample_id=row.id,
            tenant_id=row.tenant_id,
            attempt=row.attempt,
            crashes=row.crashes,
            base=row.base,
            spec=spec,
            adapters=tuple(
                PlannedAdapter(
                    adapters[part.adapter_id].sha256, adapters[part.adapter_id].object_key, part.weight, part.label
                )
                for part in spec.adapters
            ),
            seconds_left=_seconds_left(row, moment),
        )
        for row, spec in specs
    ]


def _seconds_left(row: Sample, moment: datetime | None) -> float | None:
    return None if row.deadline is None or moment is None else max(0.0, (row.deadline - moment).total_seconds())


def _held(plan: Claimed) -> Update:
    return update(Sample).where(Sample.id == plan.sample_id, Sample.status == "running", Sample.attempt == plan.attempt)
