"""Adapters: what jobs made, each a small part of its base's size."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from api.content import Stored, object_reply
from api.deps import AfterParam, LimitParam, ReadSessionDep, ServicesDep, SessionDep, TenantDep
from api.labels import LABELS_PARAM, LabelsParam
from api.schemas.adapters import AdapterRead, AdapterUpdate
from api.schemas.base import UNCHANGED, Deleted, ListRead, problems
from api.states import check_state, state_reply
from core.adapters import service as adapters
from core.adapters.repository import AdapterRepository

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


@router.get(
    "",
    responses=problems(404, 422),
    openapi_extra={"parameters": [LABELS_PARAM]},
    summary="List adapters, newest first",
)
def list_adapters(
    session: ReadSessionDep,
    caller: TenantDep,
    labels: LabelsParam,
    after: AfterParam = None,
    limit: LimitParam = 20,
) -> ListRead[AdapterRead]:
    page = AdapterRepository(session, caller.tenant_id).list_newest(after, limit, labels)
    return ListRead[AdapterRead].of([AdapterRead.of(row) for row in page.rows], page.has_more)


@router.get("/{adapter_id}", response_model=AdapterRead, responses={**UNCHANGED, **problems(404)}, summary="An adapter")
def get_adapter(adapter_id: str, request: Request, session: ReadSessionDep, caller: TenantDep) -> Response:
    return state_reply(request, AdapterRead.of(AdapterRepository(session, caller.tenant_id).get(adapter_id)))


@router.patch(
    "/{adapter_id}", response_model=AdapterRead, responses=problems(400, 404, 412, 422), summary="Change its metadata"
)
def update_adapter(
    adapter_id: str, body: AdapterUpdate, request: Request, session: SessionDep, caller: TenantDep
) -> Response:
    """`metadata` replaces what was there. `If-Match` refuses to overwrite what somebody else changed meanwhile."""
    present = AdapterRepository(session, caller.tenant_id).lock(adapter_id)
    check_state(request, AdapterRead.of(present))
    changed = adapters.update_adapter(session, caller.tenant_id, adapter_id, body.metadata)
    return state_reply(request, AdapterRead.of(changed))


@router.delete("/{adapter_id}", responses=problems(404, 412), summary="Delete an adapter")
def delete_adapter(adapter_id: str, request: Request, session: SessionDep, caller: TenantDep) -> Deleted:
    """Image requests that are under way end on it; new ones answer 404."""
    delete_unchanged(request, session, caller.tenant_id, adapter_id)
    return Deleted(id=adapter_id, object="adapter")


@router.head("/{adapter_id}/content", include_in_schema=False)
@router.get(
    "/{adapter_id}/content",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}, **UNCHANGED, **problems(404, 410)},
    summary="The adapter as safetensors",
)
def get_adapter_content(adapter_id: str, request: Request, services: ServicesDep, caller: TenantDep) -> Response:
    with services.database.read() as session:
        row = AdapterRepository(session, caller.tenant_id).get(adapter_id)
    stored = Stored(row.object_key, row.sha256, row.bytes, f"{row.id}.safetensors")
    return object_reply(request, services.store, stored)


def delete_unchanged(request: Request, session: Session, tenant_id: str, adapter_id: str) -> None:
    """By whichever of its names. Raises PreconditionFailed where If-Match names a state that has passed."""
    check_state(request, AdapterRead.of(AdapterRepository(session, tenant_id).lock(adapter_id)))
    adapters.delete_adapter(session, tenant_id, adapter_id)
