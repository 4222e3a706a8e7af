"""API keys of the tenant."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from api.deps import AfterParam, LimitParam, ReadSessionDep, SessionDep, TenantDep
from api.once import OnceDep
from api.schemas.api_keys import KeyCreate, KeyCreated, KeyRead
from api.schemas.base import Deleted, ListRead, problems
from core.errors import Conflict
from core.tenants import service as tenants

router = APIRouter(prefix="/v1/api_keys", tags=["account"])


@router.post("", response_model=KeyCreated, responses=problems(400, 409, 422), summary="Make a key")
def create_api_key(body: KeyCreate, session: SessionDep, caller: TenantDep, once: OnceDep) -> JSONResponse:
    """The secret is in this reply alone."""
    made: list[tenants.NewKey] = []

    def create() -> dict[str, str]:
        made.append(tenants.create_key(session, caller.tenant_id, body.name))
        return {"id": made[0].key.id}  # the memory of the request must not hold the secret

    stored, is_new = once.once(session, create)
    if not is_new:
        raise Conflict(
            f"this request made {stored['id']}; its secret was shown once and is not kept: revoke it and make another",
            code="secret_not_kept",
        )
    return JSONResponse(KeyCreated.with_secret(made[0].key, made[0].secret).model_dump(mode="json"))


@router.get("", responses=problems(404, 422), summary="List keys, newest first, the revoked ones too")
def list_api_keys(
    session: ReadSessionDep, caller: TenantDep, after: AfterParam = None, limit: LimitParam = 20
) -> ListRead[KeyRead]:
    page = tenants.list_keys(session, caller.tenant_id, after, limit)
    return ListRead[KeyRead].of([KeyRead.of(row) for row in page.rows], page.has_more)


@router.delete("/{key_id}", responses=problems(404, 409), summary="Revoke a key")
def delete_api_key(key_id: str, session: SessionDep, caller: TenantDep) -> Deleted:
    """Dead at once. The last live key of a tenant stays: 409."""
    tenants.revoke_key(session, caller.tenant_id, key_id)
    return Deleted(id=key_id, object="api_key")
