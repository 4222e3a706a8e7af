"""Fine-tuning jobs, OpenAI's shape."""

import secrets
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sqlalchemy.orm import Session

from api.content import Stored, object_reply
from api.deps import (
    AfterParam,
    CatalogDep,
    LimitParam,
    ReadSessionDep,
    ServicesDep,
    SessionDep,
    SettingsDep,
    StreamSlotDep,
    TenantDep,
    public_url,
)
from api.events import EVENT_STREAM, event_number, event_stream, last_event_id
from api.labels import LABELS_PARAM, LabelsParam
from api.once import OnceDep
from api.routes.images import named_model
from api.schemas.base import UNCHANGED, ListRead, problems
from api.schemas.jobs import (
    CheckpointRead,
    EventRead,
    JobCreate,
    JobRead,
    MetricRead,
    PreviewRead,
    Previews,
)
from api.states import check_state, state_reply
from core.adapters.repository import AdapterRepository
from core.bases import Catalog
from core.diffusion.catalog import BaseSummary
from core.errors import Invalid, NotFound
from core.jobs import service as jobs
from core.jobs.queue import positions
from core.jobs.repository import JobRepository
from core.jobs.start import Start, from_adapter, from_checkpoint, is_checkpoint_name, seed_of_origin
from core.jobs.states import Status
from core.models import Checkpoint, Job
from core.training.spec import POINTER

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

_Verb = Callable[[Session, str, str], Job]


@router.post("", response_model=JobRead, responses=problems(400, 404, 409, 422), summary="Queue a fine-tune")
def create_job(
    body: JobCreate, session: SessionDep, caller: TenantDep, once: OnceDep, catalog: CatalogDep, settings: SettingsDep
) -> JSONResponse:
    """It trains an adapter of the base on the file's images; follow it by `GET`, or by its events."""

    def create() -> JobRead:
        base, start = _origin(catalog, session, caller.tenant_id, body)
        seed = body.seed
        if seed is None and start is not None:
            seed = seed_of_origin(session, start, body.training_file)
        job = jobs.create_job(
            session,
            caller.tenant_id,
            base,
            dataset_id=body.training_file,
            hyperparameters=body.asked(),
            suffix=body.suffix,
            seed=secrets.randbelow(2**31) if seed is None else seed,
            labels=body.metadata,
            evaluate=bool(body.evaluate),
            start=start,
            max_queued=settings.max_queued_jobs,
            max_steps=settings.max_steps,
            max_devices=settings.max_devices,
        )
        return _read(session, caller.tenant_id, [job])[0]

    try:
        return once.reply(session, create)
    except Invalid as error:
        raise _placed(error, body) from error


@router.get(
    "",
    responses=problems(404, 422),
    openapi_extra={"parameters": [LABELS_PARAM]},
    summary="List jobs, newest first",
)
def list_jobs(
    session: ReadSessionDep,
    caller: TenantDep,
    labels: LabelsParam,
    status: Annotated[Status | None, Query(description="Those in this state alone.")] = None,
    after: AfterParam = None,
    limit: LimitParam = 20,
) -> ListRead[JobRead]:
    page = JobRepository(session, caller.tenant_id).list_newest(after, limit, labels, status)
    return ListRead[JobRead].of(_read(session, caller.tenant_id, page.rows), page.has_more)


@router.get(
    "/{job_id}", response_model=JobRead, responses={**UNCHANGED, **problems(404)}, summary="A job and how far it is"
)
def get_job(job_id: str, request: Request, session: ReadSessionDep, caller: TenantDep) -> Response:
    job = JobRepository(session, caller.tenant_id).get(job_id)
    return state_reply(request, _read(session, caller.tenant_id, [job])[0])


@router.post("/{job_id}/cancel", response_model=JobRead, responses=problems(404, 409, 412), summary="Cancel a job")
def cancel_job(job_id: str, request: Request, session: SessionDep, caller: TenantDep, once: OnceDep) -> JSONResponse:
    """At once where no worker holds it, else at its next step. A job that has ended answers 409."""
    return once.reply(session, lambda: _moved(jobs.cancel_job, job_id, request, session, caller.tenant_id))


@router.post("/{job_id}/pause", response_model=JobRead, responses=problems(404, 409, 412), summary="Pause a job")
def pause_job(job_id: str, request: Request, session: SessionDep, caller: TenantDep, once: OnceDep) -> JSONResponse:
    """It keeps its checkpoint and gives the device away until it is resumed."""
    return once.reply(session, lambda: _moved(jobs.pause_job, job_id, request, session, caller.tenant_id))


@router.post("/{job_id}/resume", response_model=JobRead, responses=problems(404, 409, 412), summary="Resume a job")
def resume_job(job_id: str, request: Request, session: SessionDep, caller: TenantDep, once: OnceDep) -> JSONResponse:
    """It goes on from its last checkpoint and ends in the same adapter as if it had never been paused."""
    return once.reply(session, lambda: _moved(jobs.resume_job, job_id, request, session, caller.tenant_id))


@router.get(
    "/{job_id}/events",
    response_model=ListRead[EventRead],
    responses={200: {"content": {EVENT_STREAM: {}}}, **problems(404, 422)},
    summary="What happened, newest first; or a stream of it, in order",
)
def list_job_events(
    job_id: str,
    request: Request,
    services: ServicesDep,
    caller: TenantDep,
    take_stream_slot: StreamSlotDep,
    after: AfterParam = None,
    limit: LimitParam = 20,
) -> Response:
    """`Accept: text/event-stream` streams from the first event, or from after `Last-Event-ID`, to the job's end."""
    is_stream = EVENT_STREAM in request.headers.get("accept", "")
    with services.database.read() as session:
        repository = JobRepository(session, caller.tenant_id)
        repository.get(job_id)
        if not is_stream:
            page = repository.list_events(job_id, _event_after(after), limit)
            events = [EventRead.of(row) for row in page.rows]
            return JSONResponse(ListRead[EventRead].of(events, page.has_more).model_dump(mode="json"))
    since = last_event_id(request)
    take_stream_slot()
    stream = event_stream(services.database, caller.tenant_id, job_id, since)
    return StreamingResponse(stream, media_type=EVENT_STREAM, headers={"X-Accel-Buffering": "no"})


@router.get("/{job_id}/checkpoints", responses=problems(404, 422), summary="List checkpoints, newest first")
def list_job_checkpoints(
    job_id: str, session: ReadSessionDep, caller: TenantDep, after: AfterParam = None, limit: LimitParam = 20
) -> ListRead[CheckpointRead]:
    rows = JobRepository(session, caller.tenant_id).list_checkpoints(job_id)
    rows = rows[_index_after(rows, after) :]
    return ListRead[CheckpointRead].of([CheckpointRead.of(row) for row in rows[:limit]], len(rows) > limit)


@router.get("/{job_id}/metrics", responses=problems(404, 422), summary="Losses and speeds, in order of steps")
def list_job_metrics(
    job_id: str,
    session: ReadSessionDep,
    caller: TenantDep,
    after: Annotated[int, Query(ge=-1, lt=2**31, description="The last step that is known already.")] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ListRead[MetricRead]:
    rows = JobRepository(session, caller.tenant_id).list_metrics(job_id, after, limit + 1)
    return ListRead[MetricRead].of([MetricRead.of(row) for row in rows[:limit]], len(rows) > limit)


@router.get("/{job_id}/previews", responses=problems(404), summary="Pictures drawn during training, in order of steps")
def list_job_previews(
    job_id: str, request: Request, services: ServicesDep, session: ReadSessionDep, caller: TenantDep
) -> ListRead[PreviewRead]:
    rows = JobRepository(session, caller.tenant_id).list_previews(job_id)
    path = f"{router.prefix}/{job_id}/previews"
    previews = [PreviewRead.of(row, public_url(services, request, f"{path}/{row.id}/content")) for row in rows]
    return ListRead[PreviewRead].of(previews)


@router.head("/{job_id}/previews/{preview_id}/content", include_in_schema=False)
@router.get(
    "/{job_id}/previews/{preview_id}/content",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **UNCHANGED, **problems(404, 410)},
    summary="A preview as PNG",
)
def get_job_preview(
    job_id: str, preview_id: str, request: Request, services: ServicesDep, caller: TenantDep
) -> Response:
    with services.database.read() as session:
        row = JobRepository(session, caller.tenant_id).get_preview(job_id, preview_id)
    stored = Stored(row.object_key, row.sha256, row.bytes, f"{row.id}.png", "image/png")
    return object_reply(request, services.store, stored)


def _origin(catalog: Catalog, session: Session, tenant_id: str, body: JobCreate) -> tuple[BaseSummary, Start | None]:
    """The base to train on, and what of the tenant's own the job continues from."""
    if is_checkpoint_name(body.model):
        if body.checkpoint is not None:
            raise Invalid("model names a checkpoint already: leave this one out", pointer="/checkpoint")
        start = from_checkpoint(session, tenant_id, body.model, pointer="/model")
        return catalog.get(start.base), start
    base, adapter = named_model(catalog, session, tenant_id, body.model)
    if body.checkpoint is None:
        return base, None if adapter is None else from_adapter(adapter)
    if adapter is not None:
        raise Invalid("a job continues from a tuned model or from a checkpoint: name a base", pointer="/checkpoint")
    return base, from_checkpoint(session, tenant_id, body.checkpoint)


def _read(session: Session, tenant_id: str, rows: list[Job]) -> list[JobRead]:
    tuned = AdapterRepository(session, tenant_id).names_of([row.adapter_id for row in rows if row.adapter_id])
    waiting = positions(session, [row.id for row in rows if row.status == "queued"])
    return [JobRead.of(row, tuned.get(row.adapter_id or ""), waiting.get(row.id)) for row in rows]


def _moved(verb: _Verb, job_id: str, request: Request, session: Session, tenant_id: str) -> JobRead:
    # Locked, so that it stays as it was checked; `resume_job` has a lock to take before this one.
    job = JobRepository(session, tenant_id).get(job_id, lock=verb is not jobs.resume_job)
    check_state(request, _read(session, tenant_id, [job])[0])
    return _read(session, tenant_id, [verb(session, tenant_id, job_id)])[0]


def _placed(error: Invalid, body: JobCreate) -> Invalid:
    """The pointer into the body as it was sent: hyperparameters may stand in OpenAI's older place."""
    pointer = error.pointer or ""
    if not pointer.startswith(POINTER):
        return error
    name = pointer.removeprefix(f"{POINTER}/")
    if isinstance(body.previews, Previews) and name.removeprefix("preview_") in body.previews.model_fields_set:
        pointer = f"/previews/{name.removeprefix('preview_')}"
    elif body.hyperparameters is not None:
        pointer = f"/hyperparameters/{name}"
    return Invalid(str(error), code=error.code, pointer=pointer)


def _event_after(after: str | None) -> int | None:
    if after is None:
        return None
    number = event_number(after)
    if number is None:
        raise NotFound(f"no event {after}", pointer="/after")
    return number


def _index_after(rows: list[Checkpoint], after: str | None) -> int:
    if after is None:
        return 0
    ids = [row.id for row in rows]
    if after not in ids:
        raise NotFound(f"no checkpoint {after}", pointer="/after")
    return ids.index(after) + 1
