"""The verbs of an evaluation: asked for by a tenant or by a job that has ended, drawn and measured by a device worker.

Every write of a worker carries its attempt in the WHERE: a late worker writes nothing.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, select, true, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import Update

from core import outbox
from core.bases import Catalog
from core.db.leases import list_lost
from core.db.session import now, wrote
from core.diffusion.catalog import BaseSummary
from core.errors import Conflict, Invalid, OverQuota
from core.evaluations.repository import EvaluationRepository
from core.evaluations.spec import EvaluationSpec, resolve
from core.models import Adapter, Dataset, Evaluation, Job, Tenant
from core.samples.spec import SampleSpec
from core.tenants.admission import admit
from core.unread import Unread

UNFINISHED = ("queued", "running")
_UNREAD = Unread("evaluation")


@dataclass(frozen=True)
class Claimed:
    """One claim of one evaluation: the fence that every write carries, whether or not its request can be read."""

    evaluation_id: str
    attempt: int


@dataclass(frozen=True)
class EvaluationPlan(Claimed):
    """And what a worker needs."""

    tenant_id: str
    crashes: int  # of workers
    base: str
    spec: EvaluationSpec
    classes: tuple[str, ...]  # the model's
    adapter_key: str | None
    adapter_digest: str | None
    pack_key: str
    pack_sha256: str
    partial_key: str | None
    partial_sha256: str | None


def create_evaluation(
    session: Session,
    tenant_id: str,
    base: BaseSummary,
    adapter: Adapter | None,
    dataset: Dataset,
    spec: EvaluationSpec,
    max_queued: int | None = None,
) -> Evaluation:
    """Queue it. Raises OverQuota, Invalid, Suspended."""
    if adapter is None and not base.num_classes:
        raise Invalid(f"{base.name} has no classes to draw: name a tuned model", pointer="/model")
    admit(session, tenant_id)
    if max_queued is not None:
        mine = (Evaluation.tenant_id == tenant_id, Evaluation.status.in_(UNFINISHED))
        waiting = session.scalar(select(func.count()).select_from(Evaluation).where(*mine)) or 0
        if waiting >= max_queued:
            raise OverQuota(f"{waiting} evaluations are unfinished: wait for some", code="too_many_evaluations")
    evaluation = Evaluation(
        tenant_id=tenant_id,
        dataset_id=dataset.id,
        model=adapter.model if adapter else base.name,
        base=base.name,
        base_fingerprint=base.fingerprint,
        adapter_id=adapter.id if adapter else None,
        request=spec.to_json(),
    )
    session.add(evaluation)
    session.flush()
    outbox.put(session, "evaluation.measure", evaluation_id=evaluation.id)
    return evaluation


def evaluate_adapter(session: Session, job: Job, adapter: Adapter, dataset: Dataset) -> Evaluation:
    """Measure what a job has just made against what it held out. Raises Invalid where that is too little."""
    drawn = SampleSpec.default(seed=0, size=adapter.image_size)
    evaluation = Evaluation(
        tenant_id=job.tenant_id,
        dataset_id=dataset.id,
        model=adapter.model,
        base=adapter.base,
        base_fingerprint=adapter.base_fingerprint,
        adapter_id=adapter.id,
        request=resolve(dataset, adapter, job, drawn, images=None, baseline=True).to_json(),
    )
    session.add(evaluation)
    session.flush()
    outbox.put(session, "evaluation.measure", evaluation_id=evaluation.id)
    return evaluation


def cancel_evaluation(session: Session, tenant_id: str, evaluation_id: str) -> Evaluation:
    """At once where no worker holds it; else the worker stops at its next look. Raises NotFound, Conflict."""
    evaluation = EvaluationRepository(session, tenant_id).get(evaluation_id)
    session.refresh(evaluation, with_for_update={"key_share": True})  # or a worker might hand it back in between
    own = update(Evaluation).where(Evaluation.id == evaluation.id)
    ended = {
        "status": "cancelled",
        "cancel_requested": True,
        "finished_at": now(session),
        "lease_until": None,
        "partial_key": None,
    }
    if not wrote(session, own.where(Evaluation.status == "queued").values(**ended)):
        asked = own.where(Evaluation.status == "running").values(cancel_requested=True)
        if not wrote(session, asked):
            session.refresh(evaluation)
            raise Conflict(f"evaluation {evaluation.id} is {evaluation.status} already", code="evaluation_ended")
    session.refresh(evaluation)
    return evaluation


def adapters_in_use(session: Session) -> set[str]:
    """Ids of adapters that unfinished evaluations draw with, deleted ones too."""
    used = (Evaluation.status.in_(UNFINISHED), Evaluation.adapter_id.is_not(None))
    return {adapter_id for adapter_id in session.scalars(select(Evaluation.adapter_id).where(*used)) if adapter_id}


# --- what a worker may do ---------------------------------------------------------------------------------------------


def claim(
    session: Session, worker: str, lease_seconds: float, catalog: Catalog, suspects: bool = True
) -> EvaluationPlan | None:
    """Take the next one: the tenant that has used the device least goes first, its oldest first.

    Without `suspects` none that a worker has died with. What another release wrote and this one cannot read stays in
    the queue.
    """
    while True:
        chosen = session.scalar(
            select(Evaluation)
            .join(Tenant, Tenant.id == Evaluation.tenant_id)
            .where(*_waiting(catalog), true() if suspects else Evaluation.crashes == 0)
            .order_by(Tenant.device_seconds, Evaluation.created_at, Evaluation.id)
            .limit(1)
            .with_for_update(skip_locked=True, of=Evaluation)
            .execution_options(populate_existing=True)
        )
        if chosen is None:
            return None
        spec = _UNREAD.read(chosen.id, lambda row=chosen: EvaluationSpec.from_json(row.request))
        if spec is None:
            continue
        moment = now(session)
        taken = {
            "status": "running",
            "attempt": Evaluation.attempt + 1,
            "worker": worker,
            "lease_until": moment + timedelta(seconds=lease_seconds),
            "started_at": func.coalesce(Evaluation.started_at, moment),
        }
        waiting = update(Evaluation).where(Evaluation.id == chosen.id, Evaluation.status == "queued")
        if not wrote(session, waiting.values(**taken)):
            continue
        row = session.get_one(Evaluation, chosen.id, populate_existing=True)
        plan = _plan(session, row, spec, catalog.get(row.base))
        if catalog.get(row.base).fingerprint != row.base_fingerprint:
            message = f"the base {row.base} has changed since: ask again"
            fail(session, plan, code="base_changed", message=message, param="model")
            continue
        return plan


def is_waiting(session: Session, catalog: Catalog) -> bool:
    """Cheap enough to ask between steps."""
    return session.scalar(select(Evaluation.id).where(*_waiting(catalog)).limit(1)) is not None


def extend(session: Session, plan: EvaluationPlan, lease_seconds: float) -> bool:
    until = now(session) + timedelta(seconds=lease_seconds)
    return wrote(session, _held(plan).values(lease_until=until))


def report(session: Session, plan: EvaluationPlan, drawn: int) -> bool:
    """Write down how far it is. False: stop, for it was cancelled or another attempt has taken over."""
    asked = _held(plan).values(drawn=drawn).returning(Evaluation.cancel_requested)
    row = session.execute(asked).one_or_none()
    return row is not None and not row[0]


def add_partial(session: Session, plan: EvaluationPlan, *, drawn: int, key: str, sha256: str) -> bool:
    """Point to the features of what is drawn so far. New pictures clear the count of crashes."""
    return wrote(session, _held(plan).values(drawn=drawn, partial_key=key, partial_sha256=sha256, crashes=0))


def drop_partial(session: Session, plan: EvaluationPlan) -> bool:
    """It cannot be read: begin anew."""
    return wrote(session, _held(plan).values(drawn=0, partial_key=None, partial_sha256=None))


def stop(session: Session, plan: Claimed) -> bool:
    """Carry out the cancel that `report` told of."""
    asked = _held(plan).where(Evaluation.cancel_requested)
    return wrote(
        session, asked.values(status="cancelled", finished_at=now(session), lease_until=None, partial_key=None)
    )


def release(session: Session, plan: Claimed) -> bool:
    """Back to the queue: the slice is over, the worker shuts down, or its store does not answer."""
    if stop(session, plan):
        return False
    if not wrote(session, _held(plan).values(status="queued", lease_until=None)):
        return False
    outbox.put(session, "evaluation.measure", evaluation_id=plan.evaluation_id)
    return True


def put_back(session: Session, plan: Claimed, reason: str, max_crashes: int) -> bool:
    """This attempt crashed: cancelled if that was asked for, `crashed` at the limit, else again."""
    if stop(session, plan):
        return True
    row = session.get_one(Evaluation, plan.evaluation_id, populate_existing=True)
    if row.status != "running" or row.attempt != plan.attempt:
        return False
    if row.crashes + 1 >= max_crashes:
        message = f"given up after {row.crashes + 1} crashes: {reason}"
        return fail(session, plan, code="crashed", message=message)
    row.crashes += 1
    session.flush()
    return release(session, plan)


def finish(session: Session, plan: EvaluationPlan, result: dict[str, Any]) -> bool:
    """The result, shown by the adapter too. False: cancelled, or another attempt has taken over."""
    values = {
        "status": "succeeded",
        "result": result,
        "drawn": plan.spec.total,
        "finished_at": now(session),
        "lease_until": None,
        "partial_key": None,
    }
    if not wrote(session, _held(plan).where(Evaluation.cancel_requested.is_(False)).values(**values)):
        stop(session, plan)
        return False
    row = session.get_one(Evaluation, plan.evaluation_id, populate_existing=True)
    if row.adapter_id is not None:
        adapter = session.get_one(Adapter, row.adapter_id, with_for_update=True, populate_existing=True)
        adapter.metrics = {**adapter.metrics, "evaluation": {"id": row.id, **_summary(result)}}
    return True


def fail(session: Session, plan: Claimed, *, code: str, message: str, param: str | None = None) -> bool:
    error = {"code": code, "message": message, "param": param}
    values = {"status": "failed", "error": error, "finished_at": now(session), "lease_until": None, "partial_key": None}
    return wrote(session, _held(plan).values(**values))


def sweep(session: Session, max_crashes: int) -> bool:
    """Take back evaluations whose lease ran out. True when any waits for a worker."""
    for row in list_lost(session, Evaluation, "running"):
        put_back(session, Claimed(row.id, row.attempt), "its worker fell silent", max_crashes)
    return session.scalar(select(Evaluation.id).where(Evaluation.status == "queued").limit(1)) is not None


def find_using(session: Session, dataset_id: str) -> str | None:
    """An unfinished evaluation that needs the dataset."""
    using = (Evaluation.dataset_id == dataset_id, Evaluation.status.in_(UNFINISHED))
    return session.scalar(select(Evaluation.id).where(*using).limit(1))


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    """What fits on an adapter's page."""
    before, after = result["before"], result["after"]
    return {
        "kernel_distance": after["kernel_distance"],
        "kernel_distance_before": before["kernel_distance"] if before else None,
        "moved": result["moved"],
        "coverage": after["coverage"],
        "counts": after["counts"],
    }


def _waiting(catalog: Catalog) -> tuple[ColumnElement[bool], ...]:
    queued = (Evaluation.status == "queued", Evaluation.base.in_(catalog.names()))
    return *queued, Evaluation.id.not_in(_UNREAD.ids())


def _plan(session: Session, row: Evaluation, spec: EvaluationSpec, base: BaseSummary) -> EvaluationPlan:
    dataset = session.get_one(Dataset, row.dataset_id)
    adapter = session.get_one(Adapter, row.adapter_id) if row.adapter_id else None
    own = [str(name) for name in adapter.classes] if adapter else list(base.id2label.values())
    return EvaluationPlan(
        evaluation_id=row.id,
        tenant_id=row.tenant_id,
        attempt=row.attempt,
        crashes=row.crashes,
        base=row.base,
        spec=spec,
        classes=tuple(own),
        adapter_key=adapter.object_key if adapter else None,
        adapter_digest=adapter.sha256 if adapter else None,
        pack_key=dataset.pack_key or "",
        pack_sha256=dataset.pack_sha256 or "",
        partial_key=row.partial_key,
        partial_sha256=row.partial_sha256,
    )


def _held(plan: Claimed) -> Update:
    own = (Evaluation.id == plan.evaluation_id, Evaluation.status == "running", Evaluation.attempt == plan.attempt)
    return update(Evaluation).where(*own)
