"""What a route may ask for. One request is one transaction."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Annotated, Any, cast

from fastapi import Depends, Query, Request
from sqlalchemy.orm import Session

from api.middleware import CALLER, Caller
from api.schemas.base import Text
from api.services import Services
from core import faults, outbox
from core.bases import Catalog
from core.errors import DomainError, Unavailable
from core.settings import Settings


async def services_of(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(services_of)]


def get_session(services: ServicesDep) -> Iterator[Session]:
    """Commit if the route returns, roll back if it raises; then say that there is work, if there is."""
    with services.database.write() as session:
        yield session
        faults.point("before_commit")
    committed(services, session)


def committed(services: Services, session: Session) -> None:
    """After the commit: a word that is lost costs a poll, so no request waits for the broker."""
    faults.point("after_commit_before_publish")
    if session.info.get(outbox.NUDGES):
        services.rouser.rouse()
    faults.point("after_commit_before_reply")


def get_read_session(services: ServicesDep) -> Iterator[Session]:
    with services.database.read() as session:
        yield session


# scope="function": the commit comes before the response, so a client never sees a lost 2xx. Routes that ask the object
# store or wait take no session: they open a short one of their own, so that none stays open across the network.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
ReadSessionDep = Annotated[Session, Depends(get_read_session, scope="function")]


async def get_caller(request: Request) -> Caller:
    return cast(Caller, request.scope[CALLER])


async def get_settings(services: ServicesDep) -> Settings:
    return services.settings


def get_catalog(services: ServicesDep) -> Catalog:
    """The bases, or 503: a base that cannot be read is the operator's trouble, not the caller's."""
    try:
        services.catalog.names()
    except DomainError as error:
        raise Unavailable("a base model of this service cannot be read", code="base_unavailable") from error
    return services.catalog


TenantDep = Annotated[Caller, Depends(get_caller)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
CatalogDep = Annotated[Catalog, Depends(get_catalog)]


async def get_stream_slot(request: Request, caller: TenantDep) -> AsyncIterator[Callable[[], None]]:
    """Call it before a stream begins: it takes one of the tenant's, or raises OverQuota. Whatever was taken is given
    back when the reply is over, also where its reader has gone."""
    with ExitStack() as held:
        yield lambda: held.enter_context(request.app.state.streams.one(caller.tenant_id))


StreamSlotDep = Annotated[Callable[[], None], Depends(get_stream_slot, scope="request")]

LimitParam = Annotated[int, Query(ge=1, le=100, description="How many at most.")]
AfterParam = Annotated[Text | None, Query(max_length=200, description="Id of the last one of the page before.")]


def public_url(services: Services, request: Request, path: str) -> str:
    base: Any = services.settings.public_url or request.base_url
    return f"{str(base).rstrip('/')}{path}"
