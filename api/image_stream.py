"""A request for images as server-sent events, in OpenAI's shape: partial images as they come, then the images."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
from anyio import to_thread
from sqlalchemy.exc import SQLAlchemyError

from api.schemas.images import error_of, size_of
from api.services import Services
from core import nudges
from core.clock import to_unix
from core.errors import Conflict, DomainError
from core.models import Sample
from core.samples import service as samples
from core.samples.repository import SampleRepository
from core.storage.base import ObjectMissing

_PING_SECONDS = 15.0
_ENDED = ("succeeded", "failed", "cancelled")


async def image_stream(services: Services, tenant_id: str, sample_id: str, keeps: bool) -> AsyncIterator[str]:
    """Until the request has ended; a reader who goes away before has cancelled it, unless it `keeps`."""
    shown = 0
    has_ended = False
    try:
        while not has_ended:
            try:
                events, shown, has_ended = await to_thread.run_sync(_look, services, tenant_id, sample_id, shown)
            except SQLAlchemyError:
                events = []  # a database that is away for a moment is asked again
            except DomainError as error:  # drawn, and not to be had: said once, as the stream's end
                events, has_ended = [{"type": "error", "error": _told(error)}], True
            for event in events:
                yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
            if not has_ended and not await services.watch.wait(nudges.news_of(sample_id), _PING_SECONDS):
                yield ": ping\n\n"
    finally:
        if not has_ended and not keeps:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(give_up, services, tenant_id, sample_id)


def _told(error: DomainError) -> dict[str, Any]:
    message = "its bytes are not to be had now" if isinstance(error, ObjectMissing) else str(error)
    return {"code": error.code, "message": message, "param": None}


def give_up(services: Services, tenant_id: str, sample_id: str) -> None:
    """Its caller has hung up: nobody would see what is drawn."""
    with services.database.write() as session:
        try:
            samples.cancel(session, SampleRepository(session, tenant_id).get(sample_id))
        except Conflict:  # it had just ended
            return


def _look(services: Services, tenant_id: str, sample_id: str, shown: int) -> tuple[list[dict[str, Any]], int, bool]:
    """What is new since `shown` partial images, how many that makes, and whether nothing can follow."""
    with services.database.write() as session:
        samples.expire(session)
    with services.database.read() as session:
        row = SampleRepository(session, tenant_id).get(sample_id)
    common = {
        "created_at": to_unix(row.created_at),
        "size": size_of(row),
        "output_format": row.request["output_format"],
        "quality": "auto",
        "background": "opaque",
    }
    if row.status not in _ENDED:
        new = row.partials[shown:]
        events = [_partial(services, partial) | common for partial in new]
        return [event for event in events if event["b64_json"]], shown + len(new), False
    if row.status != "succeeded":
        return [{"type": "error", "error": error_of(row)}], shown, True
    services.metrics.drawn(row.stats)
    return [_completed(services, row, index) | common for index in range(len(row.images or []))], shown, True


def _partial(services: Services, partial: dict[str, Any]) -> dict[str, Any]:
    try:
        data = services.fresh.get(partial["key"], partial["sha256"])
    except ObjectMissing:
        data = b""
    return {
        "type": "image_generation.partial_image",
        "b64_json": base64.b64encode(data).decode(),
        "partial_image_index": partial["number"],
        "image_index": partial["index"],
    }


def _completed(services: Services, row: Sample, index: int) -> dict[str, Any]:
    image = (row.images or [])[index]
    return {
        "type": "image_generation.completed",
        "b64_json": base64.b64encode(services.fresh.get(image["key"], image["sha256"])).decode(),
        "image_index": index,
        "seed": image["seed"],
        "id": row.id,
        "stats": row.stats,
    }
