"""Requests for images: queued in the database, drawn by whichever worker claims them first."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import Update

from core import outbox
from core.bases import Catalog
from core.db.session import now
from core.diffusion.catalog import BaseSummary
from core.errors import OverQuota
from core.models import Adapter, Sample, Tenant
from core.samples.spec import SampleSpec

_WAITING = ("queued", "running")


@dataclass(frozen=True)
class SamplePlan:
    """One claim of one request; `adapter_digest` pins the bytes that it started with."""

    sample_id: str
    tenant_id: str
    attempt: int
    base: str
    spec: SampleSpec
    adapter_key: str | None
    adapter_digest: str | None


def create_sample(
    session: Session, tenant_id: str, base: BaseSummary, adapter: Adapter | None, spec: SampleSpec, max_queued: int
) -> Sample:
    """Queue a request. Raises OverQuota."""
    # Locked, so that two requests at once cannot both be the last that fits.
    session.execute(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True))
    mine = select(func.count()).select_from(Sample)
    waiting = session.scalar(mine.where(Sample.tenant_id == tenant_id, Sample.status.in_(_WAITING))) or 0
    if waiting >= max_queued:
        raise OverQuota(f"{waiting} image requests are unfinished: wait for some", retry_after_seconds=5)
    sample = Sample(
        tenant_id=tenant_id,
        model=adapter.model if adapter else base.name,
        base=base.name,
        adapter_id=adapter.id if adapter else None,
        request=spec.to_json(),
    )
    session.add(sample)
    session.flush()
    outbox.put(session, "sample.draw", sample_id=sample.id)
    return sample


def claim(session: Session, worker: str, lease_seconds: float, catalog: Catalog, limit: int) -> list[SamplePlan]:
    """Up to `limit` waiting requests: every tenant's oldest first, then every tenant's second, and so on."""
    moment = now(session)
    turn = func.row_number().over(partition_by=Sample.tenant_id, order_by=(Sample.created_at, Sample.id)).label("turn")
    waiting = (Sample.status == "queued", Sample.base.in_(catalog.names()))
    ranked = select(Sample.id, turn).where(*waiting).subquery()
    fair = select(Sample.id).join(ranked, ranked.c.id == Sample.id).where(Sample.status == "queued")
    fair = fair.order_by(ranked.c.turn, Sample.created_at, Sample.id).limit(limit)
    chosen = list(session.scalars(fair.with_for_update(skip_locked=True, of=Sample)))
    if not chosen:
        return []
    taken = (
        update(Sample)
        .where(Sample.id.in_(chosen), Sample.status == "queued")
        .values(
            status="running",
            attempt=Sample.attempt + 1,
            worker=worker,
            lease_until=moment + timedelta(seconds=lease_seconds),
        )
        .returning(Sample)
    )
    rows = list(session.scalars(taken))
    adapters = {
        row.id: row for row in session.scalars(select(Adapter).where(Adapter.id.in_([r.adapter_id for r in rows])))
    }
    rows.sort(key=lambda row: chosen.index(row.id))
    return [_plan(row, adapters.get(row.adapter_id or "")) for row in rows]


def is_waiting(session: Session, catalog: Catalog) -> bool:
    """Cheap enough to ask between steps."""
    waiting = select(Sample.id).where(Sample.status == "queued", Sample.base.in_(catalog.names())).limit(1)
    return session.scalar(waiting) is not None


def extend(session: Session, plans: list[SamplePlan], lease_seconds: float) -> None:
    until = now(session) + timedelta(seconds=lease_seconds)
    for plan in plans:
        session.execute(_held(plan).values(lease_until=until))


def finish(session: Session, plan: SamplePlan, images: list[dict[str, Any]], stats: dict[str, Any]) -> bool:
    """False: another attempt has taken over."""
    values = {"status": "succeeded", "images": images, "stats": stats, "finished_at": now(session), "lease_until": None}
    return _wrote(session, _held(plan).values(**values))


def fail(session: Session, plan: SamplePlan, *, code: str, message: str, param: str | None = None) -> bool:
    error = {"code": code, "message": message, "param": param}
    values = {"status": "failed", "error": error, "finished_at": now(session), "lease_until": None}
    return _wrote(session, _held(plan).values(**values))


def release(session: Session, plan: SamplePlan) -> bool:
    """Back to the queue: the worker shuts down or its store does not answer."""
    if not _wrote(session, _held(plan).values(status="queued", lease_until=None)):
        return False
    outbox.put(session, "sample.draw", sample_id=plan.sample_id)
    return True


def sweep(session: Session, max_attempts: int) -> bool:
    """Take back requests whose lease ran out. True when any request waits for a worker."""
    lost = select(Sample).where(Sample.status == "running", Sample.lease_until < now(session))
    lost = lost.with_for_update(skip_locked=True).execution_options(populate_existing=True)
    for sample in session.scalars(lost).all():
        sample.crashes += 1
        session.flush()
        plan = _plan(sample, None)
        if sample.crashes >= max_attempts:
            fail(session, plan, code="crashed", message=f"given up after {sample.crashes} crashes")
        else:
            release(session, plan)
    return session.scalar(select(Sample.id).where(Sample.status == "queued").limit(1)) is not None


def list_ended(session: Session, sample_ids: list[str]) -> list[str]:
    """Which of these requests nobody needs to wait for any more."""
    ended = (Sample.id.in_(sample_ids), Sample.status.not_in(_WAITING))
    return list(session.scalars(select(Sample.id).where(*ended)))


def list_expired(session: Session, keep: timedelta, limit: int = 100) -> list[Sample]:
    """Requests whose images have been kept long enough."""
    ended = (Sample.finished_at < now(session) - keep, Sample.images.is_not(None))
    return list(session.scalars(select(Sample).where(*ended).limit(limit)))


def _plan(sample: Sample, adapter: Adapter | None) -> SamplePlan:
    return SamplePlan(
        sample_id=sample.id,
        tenant_id=sample.tenant_id,
        attempt=sample.attempt,
        base=sample.base,
        spec=SampleSpec.from_json(sample.request),
        adapter_key=adapter.object_key if adapter else None,
        adapter_digest=adapter.sha256 if adapter else None,
    )


def _held(plan: SamplePlan) -> Update:
    return update(Sample).where(Sample.id == plan.sample_id, Sample.status == "running", Sample.attempt == plan.attempt)


def _wrote(session: Session, statement: Update) -> bool:
    return session.execute(statement).rowcount == 1  # pyright: ignore[reportAttributeAccessIssue]
