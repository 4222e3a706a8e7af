"""Images, OpenAI's shape: a row in the queue, drawn by a device worker in whatever batch is running."""

import asyncio
import base64
from typing import Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Request
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
    StreamSlotDep,
    TenantDep,
    committed,
    public_url,
)
from api.errors import GivenUp, StillDrawing, TimedOut
from api.events import EVENT_STREAM
from api.image_stream import give_up, image_stream
from api.once import REPLAYED, Once, OnceDep
from api.schemas.base import UNCHANGED, ListRead, problems
from api.schemas.images import GenerationRead, ImageCreate, ImageRead, ImagesRead, error_of
from api.services import Services
from core import faults
from core.adapters.repository import AdapterRepository
from core.bases import Catalog
from core.diffusion.catalog import BaseSummary
from core.errors import Conflict, DomainError, Invalid, NotFound, Unavailable
from core.jobs.start import is_checkpoint_name
from core.models import Adapter, Sample
from core.samples import service as samples
from core.samples.repository import SampleRepository
from core.samples.spec import MEDIA_TYPES, Format, resolve
from core.storage.base import ObjectMissing

router = APIRouter(prefix="/v1/images/generations", tags=["images"])

Outcome = Literal["ended", "gone", "late"]

_GRACE_SECONDS = 1.0  # the worker says by itself what came too late
_REFUSED = frozenset({"invalid", "unknown_class", "unknown_prompt", "unknown_model", "image_not_finite"})


@router.post(
    "",
    response_model=ImagesRead,
    responses={
        200: {"content": {EVENT_STREAM: {}}},
        202: {"model": GenerationRead, "description": "With Prefer: respond-async"},
        **problems(400, 404, 409, 410, 422, 504),
    },
    summary="Draw images",
)
async def create_image(
    body: ImageCreate,
    request: Request,
    caller: TenantDep,
    services: ServicesDep,
    once: OnceDep,
    catalog: CatalogDep,
    take_stream_slot: StreamSlotDep,
) -> Response:
    """Waits for the images. `Prefer: respond-async` answers 202 at once, with a Location to look at.

    With `stream` the reply is server-sent events. A caller who hangs up has cancelled, unless an `Idempotency-Key` says
    that it may come back.
    """
    is_async = "respond-async" in [word.strip().lower() for word in request.headers.get("prefer", "").split(",")]
    if body.stream and not is_async:
        take_stream_slot()  # before there is a row, which nobody would read
    sample_id, is_new = await to_thread.run_sync(_create, services, catalog, body, once)
    headers = {} if is_new else dict(REPLAYED)
    location = f"{router.prefix}/{sample_id}"
    if is_async:
        read = await to_thread.run_sync(_generation, services, request, caller.tenant_id, sample_id)
        headers |= {"Location": location, "Preference-Applied": "respond-async"}
        return JSONResponse(read.model_dump(mode="json"), 202, headers=headers)
    keeps = once.key is not None
    if body.stream:
        stream = image_stream(services, caller.tenant_id, sample_id, keeps)
        headers |= {"Location": location, "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type=EVENT_STREAM, headers=headers)
    seconds = services.settings.image_wait_seconds
    if body.timeout is not None:
        seconds = min(seconds, body.timeout + _GRACE_SECONDS)
    outcome = await _wait(services, request, sample_id, seconds)
    if outcome == "gone" and not keeps:
        await to_thread.run_sync(give_up, services, caller.tenant_id, sample_id)
    if outcome != "ended" and not await to_thread.run_sync(_expired, services, sample_id):
        raise StillDrawing(f"{sample_id} is not drawn after {seconds:g} s; it goes on: GET {location}", location)
    as_url = body.response_format == "url"
    images = await to_thread.run_sync(_images, services, request, caller.tenant_id, sample_id, as_url)
    return JSONResponse(images.model_dump(mode="json", exclude_none=False), headers=headers)


@router.get("", responses=problems(404, 422), summary="List requests for images, newest first")
def list_image_generations(
    request: Request,
    services: ServicesDep,
    session: ReadSessionDep,
    caller: TenantDep,
    after: AfterParam = None,
    limit: LimitParam = 20,
) -> ListRead[GenerationRead]:
    """So that one whose `Location` was lost is found again."""
    page = SampleRepository(session, caller.tenant_id).list_newest(after, limit)
    return ListRead[GenerationRead].of([_as_generation(services, request, row) for row in page.rows], page.has_more)


@router.get("/{generation_id}", responses=problems(404), summary="A request for images and where they lie")
def get_image_generation(
    generation_id: str, request: Request, services: ServicesDep, session: ReadSessionDep, caller: TenantDep
) -> GenerationRead:
    return _as_generation(services, request, SampleRepository(session, caller.tenant_id).get(generation_id))


@router.post(
    "/{generation_id}/cancel",
    response_model=GenerationRead,
    responses=problems(404, 409),
    summary="Cancel a request for images",
)
def cancel_image_generation(
    generation_id: str, request: Request, services: ServicesDep, session: SessionDep, caller: TenantDep, once: OnceDep
) -> JSONResponse:
    """Its rows are free again at the next denoising step. One that has ended answers 409."""

    def cancel() -> GenerationRead:
        row = samples.cancel(session, SampleRepository(session, caller.tenant_id).get(generation_id))
        return _as_generation(services, request, row)

    return once.reply(session, cancel)


@router.head("/{generation_id}/images/{index}", include_in_schema=False)
@router.get(
    "/{generation_id}/images/{index}",
    response_class=Response,
    responses={200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}}, **UNCHANGED, **problems(404, 410)},
    summary="An image",
)
def get_image(generation_id: str, index: str, request: Request, services: ServicesDep, caller: TenantDep) -> Response:
    with services.database.read() as session:
        row = SampleRepository(session, caller.tenant_id).get(generation_id)
    images = _kept(row) if row.status == "succeeded" else []
    if index not in [str(number) for number in range(len(images))]:
        raise NotFound(f"image generation {generation_id} has no image {index}")
    image = images[int(index)]
    kind: Format = row.request["output_format"]
    stored = Stored(image["key"], image["sha256"], image["bytes"], f"{row.id}-{index}.{kind}", MEDIA_TYPES[kind])
    return object_reply(request, services.store, stored)


def _create(services: Services, catalog: Catalog, body: ImageCreate, once: Once) -> tuple[str, bool]:
    """A request that was sent before under its key is the same row, unless that came to nothing: then it is tried anew.

    Its images are never drawn twice.
    """
    with services.database.write() as session:
        own = SampleRepository(session, once.tenant_id)
        stored, is_new = once.once(
            session,
            lambda: {"sample_id": _queue(services, catalog, session, body, once).id},
            stands=lambda reply: own.get(reply["sample_id"]).status not in ("failed", "cancelled"),
        )
        faults.point("before_commit")
    committed(services, session)
    return stored["sample_id"], is_new


def _queue(services: Services, catalog: Catalog, session: Session, body: ImageCreate, once: Once) -> Sample:
    base, parts = _parts(catalog, session, once.tenant_id, body)
    settings = services.settings
    spec = resolve(base, parts, body.asked, settings.max_images_per_request)
    return samples.create_sample(
        session, once.tenant_id, base, spec, settings.max_queued_samples, settings.max_waiting_samples
    )


def _parts(
    catalog: Catalog, session: Session, tenant_id: str, body: ImageCreate
) -> tuple[BaseSummary, list[tuple[Adapter, float]]]:
    """The base and the adapters on it, each with its weight."""
    base, adapter = named_model(catalog, session, tenant_id, body.model)
    if adapter is None and body.adapter_scale is not None:
        raise Invalid(f"{base.name} is a base: adapter_scale is for a tuned model", pointer="/adapter_scale")
    if body.adapters is None:
        return base, [] if adapter is None else [(adapter, 1.0 if body.adapter_scale is None else body.adapter_scale)]
    if adapter is not None:
        raise Invalid(f"with adapters, model is their base: {base.name}", pointer="/model")
    parts: list[tuple[Adapter, float]] = []
    for number, part in enumerate(body.adapters):
        pointer = f"/adapters/{number}/model"
        its_base, adapter = named_model(catalog, session, tenant_id, part.model, pointer)
        if adapter is None:
            raise Invalid(f"{part.model} is a base: name tuned models to mix", pointer=pointer)
        if its_base.name != base.name:
            raise Invalid(f"{part.model} is made for {its_base.name}, not for {base.name}", pointer=pointer)
        parts.append((adapter, part.weight))
    return base, parts


def named_model(
    catalog: Catalog, session: Session, tenant_id: str, name: str, pointer: str = "/model"
) -> tuple[BaseSummary, Adapter | None]:
    """A base, or an adapter of the tenant's own on its base. Raises NotFound, Invalid or Conflict."""
    if not name.startswith("ft:"):
        if is_checkpoint_name(name):
            raise Invalid(
                "nothing is drawn from a checkpoint: name its job's tuned model, or continue it in a job",
                code="checkpoint_not_drawn",
                pointer=pointer,
            )
        return catalog.get(name, pointer), None
    adapter = AdapterRepository(session, tenant_id).find_model(name)
    if adapter is None:
        raise NotFound(f"no model {name}", code="model_not_found", pointer=pointer)
    if adapter.base not in catalog.names() or catalog.get(adapter.base).fingerprint != adapter.base_fingerprint:
        raise Conflict(
            f"this model was made for another {adapter.base} than the one that this service has now",
            code="base_changed",
            pointer=pointer,
        )
    return catalog.get(adapter.base), adapter


async def _wait(services: Services, request: Request, sample_id: str, seconds: float) -> Outcome:
    """Until the request has ended, its caller has hung up, or the time is over."""
    ended = asyncio.create_task(services.watch.wait(sample_id, seconds))
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            return "ended" if ended.result() else "late"
        return "gone"
    finally:
        ended.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _expired(services: Services, sample_id: str) -> bool:
    """Give up what is past its deadline; whether that was so."""
    with services.database.write() as session:
        samples.expire(session)
        return bool(samples.list_ended(session, [sample_id]))


def _images(services: Services, request: Request, tenant_id: str, sample_id: str, as_url: bool) -> ImagesRead:
    with services.database.read() as session:
        row = SampleRepository(session, tenant_id).get(sample_id)
    if row.status != "succeeded":
        raise _trouble(row)
    services.metrics.drawn(row.stats)
    if as_url:
        return ImagesRead.of(row, _linked(services, request, row))
    drawn = [(services.fresh.get(image["key"], image["sha256"]), image["seed"]) for image in _kept(row)]
    return ImagesRead.of(row, [ImageRead(b64_json=base64.b64encode(data).decode(), seed=seed) for data, seed in drawn])


def _generation(services: Services, request: Request, tenant_id: str, sample_id: str) -> GenerationRead:
    with services.database.read() as session:
        row = SampleRepository(session, tenant_id).get(sample_id)
    return _as_generation(services, request, row)


def _as_generation(services: Services, request: Request, row: Sample) -> GenerationRead:
    return GenerationRead.of(row, _linked(services, request, row) if row.images is not None else None)


def _linked(services: Services, request: Request, row: Sample) -> list[ImageRead]:
    path = f"{router.prefix}/{row.id}/images"
    return [
        ImageRead(url=public_url(services, request, f"{path}/{index}"), seed=image["seed"])
        for index, image in enumerate(_kept(row))
    ]


def _kept(row: Sample) -> list[dict[str, Any]]:
    if row.images is None:
        raise ObjectMissing(f"the images of {row.id} were kept for a time that is over", code="images_expired")
    return row.images


def _trouble(row: Sample) -> DomainError:
    """Why nothing was drawn: the caller's doing is 4xx, a timeout 504, ours 503, or 500 where we know no better.

    Only a store that was away passes by itself: all else has been tried as often as it may be.
    """
    error = error_of(row)
    code, message = error["code"], error["message"]
    if code in _REFUSED:
        return Invalid(message, code=code, pointer=f"/{error['param']}" if error.get("param") else None)
    if code == "deadline_exceeded":
        return TimedOut(message)
    if code == "internal_error":
        return DomainError(message, code=code)
    if code == ObjectMissing.code:
        return ObjectMissing(message)
    if code == "cancelled":
        return Conflict(message, code=code)
    return Unavailable(message, code=code) if code == "storage_unavailable" else GivenUp(message, code=code)
