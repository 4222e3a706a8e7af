"""A job's events as a stream (server-sent events): in order, with ids, to the job's end."""

import asyncio
import time
from collections.abc import AsyncIterator

from anyio import to_thread
from fastapi import Request
from sqlalchemy.exc import SQLAlchemyError

from api.schemas.jobs import EventRead
from core.db.session import Database
from core.errors import Invalid
from core.jobs.repository import JobRepository
from core.jobs.states import TERMINAL

EVENT_STREAM = "text/event-stream"

_POLL_SECONDS = 0.25
_PING_SECONDS = 15.0
_BATCH = 200


def event_number(text: str) -> int | None:
    """Of `ftevent-12` or `12`; None for what is no event's id. The column holds 31 bits."""
    digits = text.removeprefix("ftevent-")
    is_number = digits.isascii() and digits.isdigit() and len(digits) <= 18
    return min(int(digits), 2**63 - 1) if is_number else None


def last_event_id(request: Request) -> int:
    """What the caller has seen: 0 for nothing."""
    seen = event_number(request.headers.get("last-event-id", "").strip() or "0")
    if seen is None:
        raise Invalid("Last-Event-ID must be the id of an event of this stream", pointer="/Last-Event-ID")
    return seen


async def event_stream(database: Database, tenant_id: str, job_id: str, since: int) -> AsyncIterator[str]:
    """No session is held while it waits; a database that is away for a moment is asked again."""
    yield "retry: 2000\n\n"
    spoke = time.monotonic()
    while True:
        try:
            events, is_over = await to_thread.run_sync(_look, database, tenant_id, job_id, since)
        except SQLAlchemyError:
            events, is_over = [], False
        for number, event in events:
            yield f"id: {number}\nevent: {event.object}\ndata: {event.model_dump_json()}\n\n"
            since, spoke = number, time.monotonic()
        if is_over:
            return
        if time.monotonic() - spoke > _PING_SECONDS:
            yield ": ping\n\n"
            spoke = time.monotonic()
        if len(events) < _BATCH:
            await asyncio.sleep(_POLL_SECONDS)


def _look(database: Database, tenant_id: str, job_id: str, since: int) -> tuple[list[tuple[int, EventRead]], bool]:
    """What is new, and whether nothing can follow: the status is read first, so an end comes after its events."""
    with database.read() as session:
        repository = JobRepository(session, tenant_id)
        has_ended = repository.get(job_id).status in TERMINAL
        rows = repository.list_events_since(job_id, since, _BATCH)
        return [(row.id, EventRead.of(row)) for row in rows], has_ended and len(rows) < _BATCH
